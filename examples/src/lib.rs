//! What a user copies.
