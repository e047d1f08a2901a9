//! `stillframe-probe`: what the tests and the demo run inside a container.
//!
//! One static program, since the image has nothing but busybox. It knows Linux and nothing of Stillframe: it makes
//! a tree, lists it, holds files open, measures how long it was stopped. Fails with one line on standard
//! error and status 1; wrong usage is status 2.

mod content;
mod converse;
mod count;
mod escape;
mod fill;
mod hold;
mod list;
mod meter;
mod mounts;
mod random;
mod sys;

use std::ffi::OsString;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "usage: stillframe-probe fill DIR [--seed N] [--big BYTES] [--copy SRC] [--beyond-path-max] \
[--inode-flags] | list DIR [--cross] | hold DIR | converse FILE | count FILE SEGMENT [--aloud] | idle | pause-meter | mounts | mount-tmpfs DIR";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage) => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Err(Failure::Io(error)) => {
            eprintln!("stillframe-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

enum Failure {
    Usage,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn run(arguments: &[OsString]) -> Result<(), Failure> {
    let words: Vec<&str> = arguments.iter().map(|word| word.to_str().unwrap_or("")).collect();
    let out = &mut BufWriter::new(io::stdout().lock());
    match *words.as_slice() {
        ["fill", _, ref more @ ..] => {
            let options = fill_options(more, &arguments[2..])?;
            fill::fill(Path::new(&arguments[1]), &options, out)?;
        }
        ["list", _] => list::list(Path::new(&arguments[1]), false, out)?,
        ["list", _, "--cross"] => list::list(Path::new(&arguments[1]), true, out)?,
        ["hold", _] => hold::hold(Path::new(&arguments[1]))?,
        ["converse", _] => converse::converse(Path::new(&arguments[1]))?,
        ["count", _, _] => count::count(Path::new(&arguments[1]), Path::new(&arguments[2]), false)?,
        ["count", _, _, "--aloud"] => count::count(Path::new(&arguments[1]), Path::new(&arguments[2]), true)?,
        ["idle"] => {
            println!("ready");
            hold::idle();
        }
        ["pause-meter"] => meter::meter(&mut io::stdin().lock(), out)?,
        ["mounts"] => mounts::mounts(out)?,
        ["mount-tmpfs", _] => {
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("guest", Path::new(&arguments[1]), "tmpfs", flags, None)
                .map_err(io::Error::from)?;
        }
        _ => return Err(Failure::Usage),
    }
    Ok(())
}

fn fill_options(words: &[&str], raw: &[OsString]) -> Result<fill::Options, Failure> {
    let mut options = fill::Options::default();
    let mut index = 0;
    while index < words.len() {
        let value = || words.get(index + 1).and_then(|word| word.parse::<u64>().ok()).ok_or(Failure::Usage);
        match words[index] {
            "--seed" => options.seed = value()?,
            "--big" => options.big = value()?,
            "--copy" => options.copy = Some(PathBuf::from(raw.get(index + 1).ok_or(Failure::Usage)?)),
            "--beyond-path-max" => options.beyond_path_max = true,
            "--inode-flags" => options.inode_flags = true,
            _ => return Err(Failure::Usage),
        }
        index += if words[index].contains("-path-max") || words[index].contains("-flags") { 1 } else { 2 };
    }
    Ok(options)
}
