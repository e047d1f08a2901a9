//! `containerd-shim-stillframe-v1`: the containerd shim of the runtime `io.containerd.stillframe.v1`. It runs containers with
//! runc, as containerd-shim-runc-v2 does, and has their tmpfs filesystems checkpointed and restored by `stillframe-runtime`.
//!
//! ```text
//!   start    bootstrap -> launch            containerd asks for a shim: binds its socket, starts `serve`
//!   serve    serve -> service -> container  the shim: one process a sandbox
//!   delete   cleanup                        the shim is dead: containerd has its remains removed
//!   fetch    fetch -> image -> store        asked by `serve`: unpacks the checkpoint in an image of containerd's
//!   -info    info                           what the runtime can do
//!   load     sandbox                        loads restored files behind a container: started by the shim itself
//! ```
//!
//! The only async crate of the workspace: what blocks (`sandbox`) is given a thread. Knows ttrpc and containerd; must never know
//! how a filesystem is saved.

mod ahead;
mod bootstrap;
mod bundle;
mod cleanup;
mod container;
mod create;
mod driver;
mod error;
mod events;
mod exec;
mod fetch;
mod full;
mod idmapped;
mod image;
mod info;
mod launch;
mod lifecycle;
mod logging;
mod metrics;
mod oom;
mod options;
mod process;
mod reaper;
mod rootfs;
mod sandbox;
mod serve;
mod service;
mod stdio;
mod store;
mod sys;

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use containerd_shim::Flags;
use containerd_shim::protos::protobuf::Message;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.split_first() {
        Some((action, [])) if action == idmapped::ACTION => {
            idmapped::hold();
            return ExitCode::SUCCESS;
        }
        Some((action, rest)) if action == fetch::ACTION => {
            return match fetch::run(rest) {
                Ok(directory) => {
                    print!("{}", directory.display());
                    ExitCode::SUCCESS
                }
                Err(error) => {
                    eprintln!("{}", error::chain(&error));
                    ExitCode::FAILURE
                }
            };
        }
        Some((action, rest)) if action == sandbox::LOAD => return sandbox::load(rest.iter().cloned()),
        _ => {}
    }
    let flags = match containerd_shim::parse(&arguments) {
        Ok(flags) => flags,
        Err(error) => return complain(&error, &mut std::io::stderr()),
    };
    match run(&flags) {
        Ok(reply) => match std::io::stdout().write_all(&reply) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => complain(&error, &mut std::io::stderr()),
        },
        // `launch` reads it there, containerd reads stderr.
        Err(error) if flags.action == "serve" => complain(&*error, &mut std::io::stdout()),
        Err(error) => complain(&*error, &mut std::io::stderr()),
    }
}

/// Does what is asked; the result goes to stdout, on which containerd expects nothing else.
fn run(flags: &Flags) -> Result<Vec<u8>, Box<dyn Error>> {
    if flags.version {
        return Ok(format!("{} {}\n", info::RUNTIME, env!("CARGO_PKG_VERSION")).into_bytes());
    }
    if flags.info {
        return Ok(info::describe(&bootstrap::read_stdin()?).write_to_bytes()?);
    }
    match flags.action.as_str() {
        "start" => {
            let (start, protocol) =
                bootstrap::parse(&bootstrap::read_stdin()?, flags, bootstrap::Environment::of_process())?;
            Ok(bootstrap::reply(&launch::start(&start)?, protocol)?)
        }
        "delete" => Ok(runtime()?.block_on(cleanup::delete(flags))?.write_to_bytes()?),
        "serve" => {
            let runtime = runtime()?;
            runtime.block_on(serve::serve(flags))?;
            // A blocked thread (a hanging filesystem) must not keep the process.
            runtime.shutdown_background();
            Ok(Vec::new())
        }
        action => {
            Err(format!("unknown action {action:?}: containerd starts this binary with start or delete")
                .into())
        }
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    // A node has a hundred of these processes, mostly asleep.
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

fn complain(error: &dyn Error, to: &mut dyn Write) -> ExitCode {
    drop(writeln!(to, "{}: {}", info::RUNTIME, error::chain(error)));
    ExitCode::FAILURE
}
