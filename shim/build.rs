//! Generates a client of containerd's images and contents from its own definitions. protox is a compiler in Rust: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let services = ["images.proto", "content.proto"]
        .map(|name| format!("github.com/containerd/containerd/api/services/{name}"));
    let definition = protox::compile(services, ["proto"])?;
    tonic_prost_build::configure().build_server(false).disable_comments(["."]).compile_fds(definition)?;
    Ok(())
}
