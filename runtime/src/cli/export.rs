//! `stillframe export`: arguments, where the archive goes, progress.
//!
//! Warnings and progress go to stderr, the latter only to a terminal. A file that was begun and couldn't be completed
//! is removed.

use std::error::Error;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use stillframe_tmpfs::entry::PathName;

use crate::export::{self, ExportError, Progress};
use crate::image::Image;
use crate::selector::Selector;

/// A tar writes in units of 20 blocks; this is some of them.
const BUFFER: usize = 256 << 10;

#[derive(Debug, clap::Args)]
pub(super) struct Export {
    /// The filesystem, if the image has several: PATH or CONTAINER:PATH.
    #[arg(long, value_name = "[CONTAINER:]PATH")]
    path: Option<Selector>,
    /// Write to this file; \"-\" is the standard output.
    #[arg(long, short, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// The image directory.
    image: PathBuf,
}

pub(super) fn run(arguments: &Export) -> Result<(), Box<dyn Error>> {
    let image = Image::open(&arguments.image)?;
    let index = export::choose(&image, arguments.path.as_ref())?;
    let mut shown = Shown(ProgressBar::hidden());
    let done = if arguments.output == Path::new("-") {
        // Without Rust's own line buffer.
        let stdout = rustix::io::dup(io::stdout())?;
        if stdout.is_terminal() {
            return Err(ExportError::Terminal.into());
        }
        write(&image, index, File::from(stdout), &mut shown)
    } else {
        to_file(&image, index, &arguments.output, &mut shown)
    };
    shown.0.finish_and_clear();
    Ok(done?)
}

fn to_file(image: &Image, index: usize, path: &Path, shown: &mut Shown) -> Result<(), ExportError> {
    let file = File::create(path).map_err(|source| ExportError::Make { path: path.to_owned(), source })?;
    if file.is_terminal() {
        return Err(ExportError::Terminal);
    }
    let regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
    let done = write(image, index, file, shown);
    if done.is_err() && regular {
        let _ = std::fs::remove_file(path);
    }
    done
}

fn write(image: &Image, index: usize, out: File, shown: &mut Shown) -> Result<(), ExportError> {
    export::export(image, index, &mut BufWriter::with_capacity(BUFFER, out), shown)
}

/// Progress on the standard error, if that is a terminal.
struct Shown(ProgressBar);

impl Progress for Shown {
    fn begin(&mut self, bytes: u64) {
        let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
        self.0 = ProgressBar::new(bytes).with_style(style.expect("a valid template"));
    }

    fn advance(&mut self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn left_out(&mut self, path: &PathName) {
        self.0.suspend(|| {
            eprintln!("stillframe: \"{path}\" is a socket, which a tar archive can't hold: left out")
        });
    }
}
