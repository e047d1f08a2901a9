//! The writer whose files only SQLite can read.

use std::path::Path;

use crate::{Seen, Step, Tree, make};

/// The writer whose files only SQLite can read; see [`steps_of_database`].
pub const SQLITE: &str = "sqlite";

/// Transactions of SQLite with its write-ahead log, the index of which is mapped.
pub(crate) fn sqlite(dir: &Path) -> Step {
    let database = rusqlite::Connection::open(dir.join("db")).unwrap();
    database.pragma_update(None, "journal_mode", "wal").unwrap();
    database.pragma_update(None, "synchronous", "off").unwrap();
    database.execute_batch("create table steps (step integer, twice integer, filler blob)").unwrap();
    Box::new(move |s| {
        let sql = "insert into steps values (?1, ?1 + ?1, randomblob(500)); ";
        database.execute(sql, [s as i64]).unwrap();
        if s.is_multiple_of(300) {
            database.execute("delete from steps where step < ?1", [s as i64]).unwrap();
        }
    })
}

/// The steps in the database among `files`, first and last, if it is whole.
pub fn steps_of_database(files: &Tree, scratch: &Path) -> Result<(u64, u64), String> {
    for (name, file) in files {
        let Seen::File { content, .. } = file else { return Err(format!("{name} is no file")) };
        make(&scratch.join(name), content);
    }
    let failed = |error: rusqlite::Error| error.to_string();
    let database = rusqlite::Connection::open(scratch.join("db")).map_err(failed)?;
    let whole: String = database.query_row("pragma integrity_check", [], |row| row.get(0)).map_err(failed)?;
    if whole != "ok" {
        return Err(whole);
    }
    let sql = "select coalesce(min(step), 0), coalesce(max(step), 0), count(*), total(twice - step - step) from steps";
    let (first, last, count, wrong): (i64, i64, i64, f64) = database
        .query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))
        .map_err(failed)?;
    let all = count == if last == 0 { 0 } else { last - first + 1 };
    if all && wrong == 0.0 {
        Ok((first as u64, last as u64))
    } else {
        Err(format!("{count} steps of {first} to {last}"))
    }
}
