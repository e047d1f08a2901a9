//! mount_setattr(2).
