//! The first words between containerd and the shim: what containerd passes to `start`, and in which form it wants the reply.
//!
//! | containerd | stdin of `start`                     | accepted reply                                    |
//! |------------|--------------------------------------|---------------------------------------------------|
//! | 1.6        | `Any` (runtime options) or nothing   | a bare address                                    |
//! | 1.7        | the same                             | a bare address, or JSON of version 2 at most      |
//! | 2.0 - 2.2  | the same                             | a bare address, or JSON                           |
//! | 2.3 -      | `BootstrapParams`                    | `BootstrapResult`, JSON, a bare address           |
//!
//! A bare address means version 2 of the task API to all of them. So who sends `BootstrapParams` gets a result of version 3,
//! everybody else the bare address, and the server speaks both versions. containerd-shim's own `run()` answers the older ones
//! with JSON of version 3 and serves that version only, which 1.6 and 1.7 refuse.

use std::io::Read;

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult, Extension, LogLevel};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{self, EnumOrUnknown, Message};
use containerd_shim::{Flags, StartOpts};

/// containerd's own limit.
const LARGEST_INPUT: u64 = 10 << 20;

/// Why `start` can't begin.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// stdin.
    #[error("containerd's parameters can't be read from stdin")]
    Read(#[source] std::io::Error),
    /// Parameters of another shim.
    #[error("containerd's parameters are for {theirs}, its arguments for {ours}")]
    Mismatch {
        /// namespace/id on stdin.
        theirs: String,
        /// namespace/id in argv.
        ours: String,
    },
    /// Nowhere to publish events.
    #[error("containerd gave no address for events: TTRPC_ADDRESS is not set")]
    NoEventAddress,
    /// The reply.
    #[error("the reply can't be encoded")]
    Encode(#[source] protobuf::Error),
}

/// The form of the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// containerd up to 2.2.
    Address,
    /// containerd from 2.3 on.
    Message,
}

/// What containerd passes in the environment.
#[derive(Debug, Default)]
pub struct Environment {
    /// TTRPC_ADDRESS: where events go.
    pub ttrpc_address: String,
    /// GRPC_ADDRESS: containerd's main socket (1.7 and later).
    pub grpc_address: String,
}

impl Environment {
    /// This process's.
    pub fn of_process() -> Self {
        let read = |name| std::env::var(name).unwrap_or_default();
        Self { ttrpc_address: read("TTRPC_ADDRESS"), grpc_address: read("GRPC_ADDRESS") }
    }
}

/// All that containerd wrote to stdin.
pub fn read_stdin() -> Result<Vec<u8>, BootstrapError> {
    let mut input = Vec::new();
    let stdin = std::io::stdin().lock();
    if std::io::IsTerminal::is_terminal(&stdin) {
        return Ok(input);
    }
    stdin.take(LARGEST_INPUT).read_to_end(&mut input).map_err(BootstrapError::Read)?;
    Ok(input)
}

/// Understands either form of parameters.
pub fn parse(input: &[u8], flags: &Flags, env: Environment) -> Result<(StartOpts, Protocol), BootstrapError> {
    let (mut params, protocol) = match parse_message(input, flags)? {
        Some(params) => (params, Protocol::Message),
        None => (legacy(input, flags, env), Protocol::Address),
    };
    if params.containerd_ttrpc_address.is_empty() {
        return Err(BootstrapError::NoEventAddress);
    }
    if flags.debug && params.log_level.value() > LogLevel::LOG_LEVEL_DEBUG as i32 {
        params.log_level = EnumOrUnknown::new(LogLevel::LOG_LEVEL_DEBUG);
    }
    Ok((params.into(), protocol))
}

fn parse_message(input: &[u8], flags: &Flags) -> Result<Option<BootstrapParams>, BootstrapError> {
    if input.is_empty() {
        return Ok(None);
    }
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else { return Ok(None) };
    if params.instance_id == flags.id && params.namespace == flags.namespace {
        return Ok(Some(params));
    }
    // An `Any` has the same wire form: its type URL reads as the id, its value, where it is UTF-8, as the namespace, and no
    // other field is there.
    let reads_as_any = BootstrapParams {
        instance_id: params.instance_id.clone(),
        namespace: params.namespace.clone(),
        ..Default::default()
    };
    if params == reads_as_any {
        return Ok(None);
    }
    Err(BootstrapError::Mismatch {
        theirs: format!("{}/{}", params.namespace, params.instance_id),
        ours: format!("{}/{}", flags.namespace, flags.id),
    })
}

fn legacy(input: &[u8], flags: &Flags, env: Environment) -> BootstrapParams {
    let options = Any::parse_from_bytes(input).ok().filter(|any| !any.type_url.is_empty());
    let extensions = options.map(|any| Extension { value: Some(any).into(), ..Default::default() });
    BootstrapParams {
        instance_id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        containerd_ttrpc_address: env.ttrpc_address,
        containerd_grpc_address: if flags.address.is_empty() {
            env.grpc_address
        } else {
            flags.address.clone()
        },
        containerd_binary: flags.publish_binary.clone(),
        extensions: extensions.into_iter().collect(),
        ..Default::default()
    }
}

/// The reply of `start`: where the task API is served.
pub fn reply(address: &str, protocol: Protocol) -> Result<Vec<u8>, BootstrapError> {
    match protocol {
        Protocol::Address => Ok(address.as_bytes().to_vec()),
        Protocol::Message => {
            let result = BootstrapResult {
                version: 3,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..Default::default()
            };
            result.write_to_bytes().map_err(BootstrapError::Encode)
        }
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim::api::Options;
    use containerd_shim::util::convert_to_any;

    use super::*;

    fn flags() -> Flags {
        Flags {
            id: "abc".into(),
            namespace: "k8s.io".into(),
            address: "/run/c.sock".into(),
            ..Default::default()
        }
    }

    fn env() -> Environment {
        Environment { ttrpc_address: "/run/c.sock.ttrpc".into(), grpc_address: "/run/other.sock".into() }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/run/new.ttrpc".into(),
            containerd_grpc_address: "/run/new.sock".into(),
            socket_dir: Some("/run/sockets".into()),
            ..Default::default()
        }
    }

    fn options(options: Options) -> Vec<u8> {
        convert_to_any(Box::new(options)).unwrap().write_to_bytes().unwrap()
    }

    #[test]
    fn containerd_2_3_is_answered_with_a_message() {
        let input = params().write_to_bytes().unwrap();
        let (start, protocol) = parse(&input, &flags(), Environment::default()).unwrap();
        assert_eq!(protocol, Protocol::Message);
        assert_eq!(
            (start.ttrpc_address.as_str(), start.address.as_str()),
            ("/run/new.ttrpc", "/run/new.sock")
        );
        assert!(start.socket_address("abc").starts_with("unix:///run/sockets/"));
        let reply = BootstrapResult::parse_from_bytes(&reply("unix:///a", protocol).unwrap()).unwrap();
        assert_eq!(
            (reply.version, reply.address.as_str(), reply.protocol.as_str()),
            (3, "unix:///a", "ttrpc")
        );
    }

    #[test]
    fn older_ones_are_answered_with_the_bare_address() {
        let crun = Options { binary_name: "crun".into(), ..Default::default() };
        for (input, expected) in [
            (Vec::new(), None),
            (b"\xff\xfe\x01".to_vec(), None),
            // No value: reads as parameters with an odd id.
            (options(Options::default()), Some(Options::default())),
            (options(crun.clone()), Some(crun)),
        ] {
            let (start, protocol) = parse(&input, &flags(), env()).unwrap();
            assert_eq!(protocol, Protocol::Address);
            assert_eq!((start.id.as_str(), start.address.as_str()), ("abc", "/run/c.sock"));
            assert_eq!(start.extension::<Options>().unwrap(), expected);
        }
        assert_eq!(reply("unix:///a", Protocol::Address).unwrap(), b"unix:///a");
    }

    #[test]
    fn parameters_of_another_shim_are_refused() {
        let input = BootstrapParams { instance_id: "other".into(), ..params() }.write_to_bytes().unwrap();
        let error = parse(&input, &flags(), env()).unwrap_err().to_string();
        assert!(error.contains("k8s.io/other") && error.contains("k8s.io/abc"), "{error}");
    }

    #[test]
    fn an_address_for_events_is_needed() {
        assert!(matches!(parse(&[], &flags(), Environment::default()), Err(BootstrapError::NoEventAddress)));
        let input = BootstrapParams { containerd_ttrpc_address: String::new(), ..params() };
        let input = input.write_to_bytes().unwrap();
        assert!(matches!(parse(&input, &flags(), env()), Err(BootstrapError::NoEventAddress)));
    }

    #[test]
    fn the_debug_flag_raises_either_log_level() {
        let flags = Flags { debug: true, ..flags() };
        let mut params = params();
        params.log_level = EnumOrUnknown::new(LogLevel::LOG_LEVEL_INFO);
        for input in [Vec::new(), params.write_to_bytes().unwrap()] {
            assert!(parse(&input, &flags, env()).unwrap().0.debug);
        }
    }
}
