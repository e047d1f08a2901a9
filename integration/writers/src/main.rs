//! `stillframe-writers PART PARTS DIR LOG READY`: runs every PARTS-th writer from the PART-th on in directories of DIR, until it
//! is killed. Notes their steps in LOG; writes a line to READY, a FIFO, when all of them are about to begin.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use stillframe_writers::{ALL, Log};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [part, parts, dir, log, ready] = arguments.as_slice() else {
        eprintln!("usage: stillframe-writers PART PARTS DIR LOG READY");
        std::process::exit(2);
    };
    let number = |text: &str| text.parse::<usize>().unwrap_or_else(|error| panic!("{text}: {error}"));
    let (part, parts, dir) = (number(part), number(parts), Path::new(dir));
    let log = Log::open(Path::new(log)).unwrap_or_else(|error| panic!("{log}: {error}"));
    let mine: Vec<_> = ALL.iter().enumerate().filter(|(number, _)| number % parts == part).collect();
    let begin = Barrier::new(mine.len() + 1);
    std::thread::scope(|scope| {
        for (number, writer) in mine {
            let (log, begin) = (&log, &begin);
            scope.spawn(move || {
                let dir = dir.join(writer.name);
                fs::create_dir(&dir).unwrap();
                let counter = File::create(dir.join("counter")).unwrap();
                counter.write_all_at(&0u64.to_le_bytes(), 0).unwrap();
                let mut step = (writer.start)(&dir);
                begin.wait();
                let started = Instant::now();
                for s in 1.. {
                    // At full rate for one second, and then for one so that a checkpoint has time to be short.
                    if started.elapsed().as_secs().is_multiple_of(2) {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    log.note(number, s, || {
                        step(s);
                        counter.write_all_at(&s.to_le_bytes(), 0).unwrap();
                    });
                }
            });
        }
        begin.wait();
        let mut ready = File::options().write(true).open(ready).unwrap();
        ready.write_all(b"writing\n").unwrap();
    });
}
