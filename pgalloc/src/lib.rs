//! Pages: page ranges, MemoryFiles, the pages file, asynchronous save and load.
//!
//! Knows no filesystem, no container and no image directory; must never learn of them.
