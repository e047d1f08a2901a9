//! An `emptyDir`, where and how kubelet makes it: a directory below the pod's, and a tmpfs on it if its medium is Memory.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::client::CriError;

/// A volume that is there until it is dropped, or the containerd that it was made for ends.
#[derive(Debug)]
pub struct MemoryVolume {
    path: PathBuf,
    mounted: bool,
}

impl MemoryVolume {
    /// The volume `name` of the pod `uid`. `kubelet` is kubelet's directory; `size` is in bytes, `None` for the medium "".
    pub fn new(kubelet: &Path, uid: &str, name: &str, size: Option<u64>) -> Result<Self, CriError> {
        let path = kubelet.join("pods").join(uid).join("volumes/kubernetes.io~empty-dir").join(name);
        let failed = |source| CriError::Io { what: path.display().to_string(), source };
        fs::create_dir_all(&path).map_err(failed)?;
        if let Some(size) = size {
            let options = format!("size={size}");
            mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
                .map_err(|errno| failed(errno.into()))?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).map_err(failed)?;
        Ok(Self { mounted: size.is_some(), path })
    }

    /// Where it is on the host.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory of it, made if it is missing, as kubelet passes it to a container with a `subPath`: bind-mounted to a place of
    /// its own.
    pub fn sub_path(&self, name: &str, container: &str, number: u32) -> Result<MemoryVolume, CriError> {
        let directory = self.path.join(name);
        let volume = self.path.file_name().expect("a volume's path ends with its name");
        let pod = self.path.ancestors().nth(3).expect("a volume is three levels below its pod");
        let path = pod.join("volume-subpaths").join(volume).join(container).join(number.to_string());
        let failed = |source| CriError::Io { what: path.display().to_string(), source };
        for made in [&directory, &path] {
            fs::create_dir_all(made).map_err(failed)?;
        }
        mount(Some(&directory), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self { path, mounted: true })
    }

    /// Names in its root, sorted.
    pub fn names(&self) -> Vec<OsString> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        names.sort();
        names
    }
}

/// As kubelet's TearDown. A test that is killed leaves this to the watchdog, since the volume is below containerd's directory.
impl Drop for MemoryVolume {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = umount2(&self.path, MntFlags::UMOUNT_NOFOLLOW)
        {
            let message = format!("{} can't be unmounted: {error}", self.path.display());
            // Something holds it that shouldn't: the test has failed, whatever it says.
            assert!(std::thread::panicking(), "{message}");
            eprintln!("{message}");
        }
    }
}
