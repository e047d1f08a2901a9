//! `-info`: what the runtime is and can do, asked by containerd before any container exists (2.0 and later).

use std::process::{Command, Stdio};

use containerd_shim::api::Options;
use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::driver;
use crate::options;

/// The runtime's name.
pub const RUNTIME: &str = "io.containerd.stillframe.v1";

/// What containerd's typeurl calls the `Features` of the OCI runtime spec, which are JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Describes the runtime; `input` is an `Any` of its options, or empty.
pub fn describe(input: &[u8]) -> RuntimeInfo {
    let any = Any::parse_from_bytes(input).ok().filter(|any| !any.type_url.is_empty());
    let options = options::decode(any.as_ref()).unwrap_or_default();
    RuntimeInfo {
        name: RUNTIME.into(),
        version: Some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() })
            .into(),
        features: features(&options).into(),
        options: any.into(),
        ..Default::default()
    }
}

/// runc's own features, which are the container's. Without them containerd takes everything for possible.
fn features(options: &Options) -> Option<Any> {
    let output = Command::new(driver::binary(options)).arg("features").stderr(Stdio::null()).output().ok()?;
    let is_json = serde_json::from_slice::<serde_json::Value>(&output.stdout).is_ok();
    (output.status.success() && is_json).then(|| Any {
        type_url: FEATURES.into(),
        value: output.stdout,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_without_features_is_described_all_the_same() {
        let options = Options { binary_name: "false".into(), ..Default::default() };
        let any = containerd_shim::util::convert_to_any(Box::new(options)).unwrap();
        let info = describe(&any.write_to_bytes().unwrap());
        assert_eq!(info.name, "io.containerd.stillframe.v1");
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        assert!(info.features.is_none());
        assert_eq!(info.options.type_url, "containerd.runc.v1.Options");
    }
}
