//! Generates the client from Kubernetes's own definition. protox is a compiler in Rust: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let definition = protox::compile(["runtime.proto"], ["proto"])?;
    tonic_prost_build::configure().build_server(false).disable_comments(["."]).compile_fds(definition)?;
    Ok(())
}
