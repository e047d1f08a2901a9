//! What is saved and restored in the benchmarks, and the tools it is compared with.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Result;

/// Where results and images go: on the disk that the target directory is on.
pub fn directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    std::path::absolute(target.join("bench")).expect("the current directory can be found")
}

/// A scratch directory on that disk.
pub fn scratch() -> Result<tempfile::TempDir> {
    fs::create_dir_all(directory())?;
    Ok(tempfile::tempdir_in(directory())?)
}

/// Bytes that don't compress and aren't zero.
pub fn noise(length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    BufReader::new(File::open("/dev/urandom")?).read_exact(&mut bytes)?;
    Ok(bytes)
}

/// One file of noise.
pub fn large(dir: &Path, bytes: u64) -> Result<()> {
    let file = File::create(dir.join("large"))?;
    let block = noise(64 << 20)?;
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(block.len() as u64);
        file.write_all_at(&block[..length as usize], at)?;
        at += length;
    }
    Ok(())
}

/// `files` files of 4 KiB, a hundred in a directory.
pub fn small(dir: &Path, files: usize) -> Result<()> {
    many(dir, files, 4096)
}

/// The same, of `size` bytes each.
pub fn many(dir: &Path, files: usize, size: usize) -> Result<()> {
    let block = noise(size + files)?;
    for number in 0..files {
        let parent = dir.join(format!("{:04}", number / 100));
        if number % 100 == 0 {
            fs::create_dir(&parent)?;
        }
        fs::write(parent.join(format!("file-{number}")), &block[number..number + size])?;
    }
    Ok(())
}

/// A file of `bytes` with a tenth of its pages, scattered.
pub fn sparse(dir: &Path, bytes: u64) -> Result<()> {
    let file = File::create(dir.join("sparse"))?;
    file.set_len(bytes)?;
    let page = noise(4096)?;
    let mut at = 0;
    while at < bytes {
        file.write_all_at(&page, at)?;
        at += 40960;
    }
    Ok(())
}

/// Runs a program; its failure is an error with what it said.
pub fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error} (scripts/setup bench installs it)"))?;
    if !output.status.success() {
        return Err(format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Bytes a second of fio's sequential direct reads or writes of `bytes` bytes: the disk's ceiling.
pub fn disk_ceiling(dir: &Path, mode: &str, bytes: u64) -> Result<f64> {
    let file = format!("--filename={}", dir.join("fio").display());
    let (mode_option, size) = (format!("--rw={mode}"), format!("--size={bytes}"));
    let common = [
        "--name=ceiling",
        "--ioengine=io_uring",
        "--direct=1",
        "--bs=1M",
        "--iodepth=16",
        "--output-format=json",
    ];
    let fio = |rw: &str| run("fio", &[&common[..], &[&file, &size, rw, "--end_fsync=1"]].concat());
    if mode == "read" {
        fio("--rw=write")?;
    }
    let report: serde_json::Value = serde_json::from_str(&fio(&mode_option)?)?;
    fs::remove_file(dir.join("fio"))?;
    report["jobs"][0][mode]["bw_bytes"].as_f64().ok_or_else(|| "fio's report has no bw_bytes".into())
}

/// Drops a file from the page cache, so that the next read comes from the disk.
pub fn evict(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}
