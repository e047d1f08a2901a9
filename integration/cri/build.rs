//! Generates the clients from Kubernetes's and containerd's own definitions. protox is a compiler in Rust: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let tasks = "github.com/containerd/containerd/api/services/tasks/v1/tasks.proto";
    let definition = protox::compile(["runtime.proto", tasks], ["proto"])?;
    tonic_prost_build::configure().build_server(false).disable_comments(["."]).compile_fds(definition)?;
    Ok(())
}
