//! What depends on the kernel's version.

/// The error that somebody gets who is denied to open a file that can't be loaded: a denial can say why since Linux 6.13.
pub fn denial() -> i32 {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    if version < (6, 13) { libc::EPERM } else { libc::EIO }
}
