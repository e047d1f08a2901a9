//! The `stillframe` command's arguments, output and errors. An error is printed once, here, with its
//! causes; the exit status is 1.

mod export;
mod load;

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use stillframe_pgalloc::Direct;
use stillframe_tmpfs::entry::{Kind, Tree};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::checkpoint::CheckpointRequest;
use crate::doctor::Finding;
use crate::image::{Image, TREE, TREE_ZSTD};
use crate::sandbox::{CheckpointResult, Sandbox};
use crate::selector::{ALL, Selector};

/// Checkpoints of containers' memory-backed filesystems.
#[derive(Debug, Parser)]
#[command(name = "stillframe", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Save the tmpfs filesystems of a running container, or of all containers of its pod.
    Fscheckpoint(Fscheckpoint),
    /// Look whether this node has what Stillframe needs, and say what won't work without it.
    Doctor,
    /// Verify an image and show what is in it.
    Inspect(Inspect),
    /// Show how far the loading of a restored container's files has come.
    Status(load::Status),
    /// Wait until something has happened to a container.
    Wait(load::Wait),
    /// What the runtime starts to load restored files; not for people.
    #[command(name = crate::lazy::ARGUMENT, hide = true)]
    Load {
        /// The filesystem's state directory, and which of the two processes it is.
        #[arg(num_args = 1..)]
        arguments: Vec<std::ffi::OsString>,
    },
    /// Write a filesystem of an image as a tar archive, which `tar --xattrs --xattrs-include='*' --acls -xpf` restores.
    Export(export::Export),
}

#[derive(Debug, clap::Args)]
struct Fscheckpoint {
    /// Directory for the image: made if it is missing, else it must be empty.
    #[arg(long, value_name = "DIR")]
    image_path: PathBuf,
    /// Save this filesystem only: PATH, CONTAINER:PATH or all-tmpfs. May be given several times.
    #[arg(long = "path", value_name = "[CONTAINER:]PATH", default_value = ALL)]
    paths: Vec<Selector>,
    /// Write pages.img past the page cache: auto does where its filesystem gains by it.
    #[arg(long, value_enum, default_value_t = DirectArgument::Auto)]
    direct: DirectArgument,
    /// Copy nothing before the container is frozen.
    #[arg(long)]
    no_precopy: bool,
    /// Give up rather than freeze the container for longer than so many milliseconds.
    #[arg(long, value_name = "MS")]
    pause_limit: Option<u64>,
    /// Keep the pages in this directory, and only the trees in the image.
    #[arg(long, value_name = "DIR")]
    pages_dir: Option<PathBuf>,
    /// Save the filesystems of all containers of the pod, in one image of one instant; ID is the pod's, or one of its containers'.
    #[arg(long)]
    pod: bool,
    /// Let the container run on; otherwise it is killed once the image is complete.
    #[arg(long)]
    leave_running: bool,
    /// containerd's namespace.
    #[arg(long, short, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// The container's id.
    #[arg(value_name = "ID")]
    container: String,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum DirectArgument {
    Auto,
    Always,
    Never,
}

impl From<DirectArgument> for Direct {
    fn from(argument: DirectArgument) -> Self {
        match argument {
            DirectArgument::Auto => Self::Auto,
            DirectArgument::Always => Self::Always,
            DirectArgument::Never => Self::Never,
        }
    }
}

#[derive(Debug, clap::Args)]
struct Inspect {
    /// List every file.
    #[arg(long, short)]
    list: bool,
    /// The image directory.
    image: PathBuf,
}

/// Runs the command with the process's arguments.
pub fn main() -> ExitCode {
    let asked = std::env::var("STILLFRAME_LOG").ok().and_then(|targets| targets.parse().ok());
    tracing_subscriber::registry()
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr))
        .with(asked.unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN)))
        .init();
    let done = match Arguments::parse().command {
        Command::Fscheckpoint(arguments) => fscheckpoint(&arguments),
        Command::Doctor => doctor(),
        Command::Inspect(arguments) => inspect(&arguments),
        Command::Status(arguments) => load::status(&arguments),
        Command::Wait(arguments) => load::wait(&arguments),
        Command::Load { arguments } => return crate::lazy::run(arguments.into_iter()),
        Command::Export(arguments) => export::run(&arguments).map(|()| String::new()),
    };
    match done {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("stillframe: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, colon-separated.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        // A cause that its effect already quotes isn't said twice.
        if !text.ends_with(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    text
}

/// There is no such container.
#[derive(Debug, thiserror::Error)]
#[error(
    "no container {id} runs under Stillframe in namespace {namespace}: \
     see `ctr --namespace {namespace} containers ls`, and check its runtime"
)]
struct NoContainer {
    id: String,
    namespace: String,
}

fn fscheckpoint(arguments: &Fscheckpoint) -> Result<String, Box<dyn Error>> {
    let (id, namespace) = (arguments.container.clone(), arguments.namespace.clone());
    let sandbox = Sandbox::of_container(&namespace, &id)?;
    let sandbox = sandbox.ok_or_else(|| NoContainer { id: id.clone(), namespace })?;
    let request = CheckpointRequest {
        pod: arguments.pod,
        pages_dir: arguments.pages_dir.clone(),
        paths: arguments.paths.clone(),
        direct: arguments.direct.into(),
        precopy: !arguments.no_precopy,
        pause_limit: arguments.pause_limit.map(Duration::from_millis),
        kill: !arguments.leave_running,
        ..CheckpointRequest::new(&id, &arguments.image_path)
    };
    let result = sandbox.checkpoint(&request)?;
    if arguments.json {
        return Ok(serde_json::to_string(&result)? + "\n");
    }
    Ok(describe(&result))
}

fn describe(result: &CheckpointResult) -> String {
    let ids: Vec<String> = result.filesystems.iter().map(ToString::to_string).collect();
    let rate = result.pages_bytes as f64 / 1e6 / result.total_ms.max(0.001);
    let unlinked = match result.unlinked.files {
        0 => String::new(),
        files => format!("left out     {files} files without a name, {} bytes\n", result.unlinked.bytes),
    };
    format!(
        "image        {}\nfilesystems  {}\nfiles        {} ({} names)\npages        {} bytes, {} of zeros left out\n{unlinked}\
         copied       {} bytes in {} rounds while it ran, {} while it was frozen\n\
         frozen       {:.1} ms\ntotal        {:.1} ms, {rate:.2} GB/s\n",
        result.image_path.display(),
        ids.join(" "),
        result.files,
        result.entries,
        result.pages_bytes,
        result.zero_bytes,
        result.copied_live_bytes,
        result.rounds,
        result.copied_frozen_bytes,
        result.frozen_ms,
        result.total_ms,
    )
}

/// The node lacks something without which nothing works.
#[derive(Debug, thiserror::Error)]
#[error("this node can't run Stillframe: see what FAILS")]
struct Unfit;

fn doctor() -> Result<String, Box<dyn Error>> {
    let findings = crate::doctor::examine();
    let mut text = String::new();
    for (name, finding) in &findings {
        writeln!(text, "{name:<20} {finding}")?;
    }
    if findings.iter().any(|(_, finding)| matches!(finding, Finding::Fatal { .. })) {
        print!("{text}");
        return Err(Unfit.into());
    }
    Ok(text)
}

fn inspect(arguments: &Inspect) -> Result<String, Box<dyn Error>> {
    let path: &Path = &arguments.image;
    let mut image = Image::open(path)?;
    image.verify_pages()?;
    let manifest = &image.manifest;
    let mut text = String::new();
    writeln!(text, "image        {} (written by stillframe {})", path.display(), manifest.stillframe)?;
    writeln!(text, "pages        {} bytes, verified", manifest.pages_length)?;
    if let Some(pod) = &manifest.pod {
        let names: Vec<&str> = manifest.containers.iter().map(|container| container.name.as_str()).collect();
        let ended = match pod.ended.as_slice() {
            [] => String::new(),
            ended => format!(", and had run {}", ended.join(" ")),
        };
        writeln!(text, "pod          {}{ended}", names.join(" "))?;
    }
    for (index, filesystem) in manifest.filesystems.iter().enumerate() {
        let id = &filesystem.resource_id;
        let tree = image.decode_tree(index)?;
        let mut more = String::new();
        for alias in &filesystem.aliases {
            writeln!(more, "  also       {alias}")?;
        }
        if let Some(private) = image.private_file(index) {
            let there = private.extents.iter().map(|extent| extent.length).sum::<u64>();
            writeln!(
                more,
                "  on disk    private file {} of {} bytes, {there} saved",
                private.index, private.size
            )?;
        }
        writeln!(
            text,
            "filesystem   {id}\n{more}  options    {}\n  files      {} ({} names), {} bytes, {} with data\n  \
             {:<10} bytes {} to {}",
            filesystem.options,
            filesystem.files,
            filesystem.entries,
            filesystem.logical_bytes,
            filesystem.data_bytes,
            filesystem.tree_length.map_or(TREE, |_| TREE_ZSTD),
            filesystem.tree_start,
            filesystem.tree_end,
        )?;
        if arguments.list {
            list(&tree, &mut text)?;
        }
    }
    Ok(text)
}

fn list(tree: &Tree, text: &mut String) -> std::fmt::Result {
    for (index, entry) in tree.entries.iter().enumerate() {
        let (letter, more) = match &entry.kind {
            Kind::Directory => ('d', String::new()),
            Kind::File { size, extents } => ('-', format!(" {size} bytes in {} extents", extents.len())),
            Kind::Symlink { target } => ('l', format!(" -> {}", target.escape_ascii())),
            Kind::Fifo => ('p', String::new()),
            Kind::Socket => ('s', String::new()),
            Kind::CharDevice { major, minor } => ('c', format!(" {major}:{minor}")),
            Kind::BlockDevice { major, minor } => ('b', format!(" {major}:{minor}")),
            Kind::HardLink { target } => ('h', format!(" link to {}", tree.path(*target))),
        };
        let attributes = &entry.attributes;
        writeln!(
            text,
            "  {letter}{:04o} {}:{} {}{more}",
            attributes.mode,
            attributes.uid,
            attributes.gid,
            tree.path(index)
        )?;
    }
    Ok(())
}
