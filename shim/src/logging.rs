//! The shim's log: lines in containerd's own format, written to the bundle's `log` fifo, which containerd copies to its log.
//!
//! One place for both kinds of records: the runtime's and the shim's come from `tracing`, those of containerd-shim, runc and
//! ttrpc from `log`, which tracing-subscriber's `init` bridges. RUST_LOG says more than the default.
//!
//! The fifo is opened for reading as well and never blocks: a containerd that is away or doesn't read costs log lines, never a
//! container. A line is one write, so lines of several shims don't mix.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Logs to the fifo (or file) at `path` from here on, panics included.
pub fn start(path: &Path, debug: bool) -> io::Result<()> {
    let fifo = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let asked = std::env::var("RUST_LOG").ok().and_then(|targets| targets.parse().ok());
    let lines = tracing_subscriber::fmt::layer()
        .event_format(Logfmt)
        .with_writer(move || Lines(fifo.try_clone().ok()));
    tracing_subscriber::registry()
        .with(lines)
        .with(asked.unwrap_or_else(|| Targets::new().with_default(level)))
        .try_init()
        .map_err(io::Error::other)?;
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    Ok(())
}

/// Writes to the fifo and never fails.
struct Lines(Option<File>);

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(fifo) = &mut self.0 {
            // Full: containerd isn't reading.
            drop(fifo.write(line));
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// logrus's text format: `time="..." level=info msg="..." key="..."`.
struct Logfmt;

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        writer.write_str("time=\"")?;
        SystemTime.format_time(&mut writer)?;
        let level = event.metadata().level().as_str().to_lowercase();
        writeln!(writer, "\" level={level} msg={}{}", quote(&fields.message), fields.rest)
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Fields {
    fn add(&mut self, field: &Field, value: String) {
        match field.name() {
            "message" => self.message = value,
            // Where a `log` record came from: target, file, line.
            name if name.starts_with("log.") => {}
            name => drop(write!(self.rest, " {name}={}", quote(&value))),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_string());
    }
}

/// A value that can't end its field or its line.
fn quote(value: &str) -> String {
    serde_json::to_string(value).expect("a string is JSON")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(line)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn records_are_one_line_each_in_logrus_s_format() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber =
            tracing_subscriber::fmt().event_format(Logfmt).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(id = "a\"\nlevel=fatal", pid = 3, "two\nlines");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        assert!(text.starts_with("time=\"20"), "{text}");
        assert!(
            text.ends_with(" level=info msg=\"two\\nlines\" id=\"a\\\"\\nlevel=fatal\" pid=\"3\"\n"),
            "{text}"
        );
    }

    #[test]
    fn a_full_fifo_costs_lines_and_not_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut lines = Lines(Some(fifo));
        for _ in 0..1000 {
            io::Write::write_all(&mut lines, &[b'x'; 1000]).unwrap();
        }
    }
}
