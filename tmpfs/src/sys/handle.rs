//! File handles: name_to_handle_at(2), open_by_handle_at(2).
