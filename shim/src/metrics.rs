//! A container's statistics as containerd's messages for cgroup v1 and v2.
//!
//! containerd-shim collects them; of v1 it leaves out what cpuacct counts (so that CPU usage is zero) and most of memory, which
//! is added here from the same cgroups-rs values; of v2 it leaves out I/O.

use std::io;
use std::path::Path;

use cgroups_rs::fs::{Cgroup, Subsystem};
use containerd_shim::cgroup::{collect_metrics, collect_metrics_v2, get_cgroup};
use containerd_shim::protos::cgroups::metrics::{MemoryEntry, Metrics};
use containerd_shim::protos::cgroups_v2::metrics::{IOEntry, IOStat};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::util::convert_to_any;

/// Why there are no statistics.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The init is dead.
    #[error("cgroup does not exist: process {pid} is gone")]
    Gone {
        /// The init.
        pid: i32,
        /// What /proc said.
        #[source]
        source: io::Error,
    },
    /// The cgroup's files.
    #[error("the cgroup of process {pid} can't be read")]
    Read {
        /// The init.
        pid: i32,
        /// What failed.
        #[source]
        source: containerd_shim::Error,
    },
}

/// The statistics of the cgroup that `pid` is in: `io.containerd.cgroups.v1.Metrics` or `.v2.Metrics`. Blocks, reading files.
pub fn collect(pid: i32) -> Result<Any, MetricsError> {
    let path = format!("/proc/{pid}/cgroup");
    Path::new(&path).metadata().map_err(|source| MetricsError::Gone { pid, source })?;
    let read = |source| MetricsError::Read { pid, source };
    describe(&get_cgroup(pid.unsigned_abs()).map_err(read)?).map_err(read)
}

fn describe(cgroup: &Cgroup) -> Result<Any, containerd_shim::Error> {
    if cgroup.v2() {
        let mut metrics = collect_metrics_v2(cgroup)?;
        // All of its controllers have one directory.
        if let Some(io) = cgroup.subsystems().iter().find_map(io_stat) {
            metrics.io = Some(io).into();
        }
        convert_to_any(Box::new(metrics))
    } else {
        let mut metrics = collect_metrics(cgroup)?;
        complete(&mut metrics, cgroup);
        convert_to_any(Box::new(metrics))
    }
}

/// `io.stat`: a line for each device, `MAJOR:MINOR KEY=VALUE ...`. `None` where there is no such controller.
fn io_stat(subsystem: &Subsystem) -> Option<IOStat> {
    let text = std::fs::read_to_string(subsystem.to_controller().path().join("io.stat")).ok()?;
    let usage = text.lines().filter_map(|line| {
        let (device, values) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let mut entry =
            IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
        for (key, value) in values.split(' ').filter_map(|value| value.split_once('=')) {
            let counter = match key {
                "rbytes" => &mut entry.rbytes,
                "wbytes" => &mut entry.wbytes,
                "rios" => &mut entry.rios,
                "wios" => &mut entry.wios,
                _ => continue,
            };
            *counter = value.parse().unwrap_or(0);
        }
        Some(entry)
    });
    Some(IOStat { usage: usage.collect(), ..Default::default() })
}

fn complete(metrics: &mut Metrics, cgroup: &Cgroup) {
    for subsystem in cgroup.subsystems() {
        match subsystem {
            Subsystem::CpuAcct(controller) => {
                let counted = controller.cpuacct();
                let usage = metrics.cpu.mut_or_insert_default().usage.mut_or_insert_default();
                usage.total = counted.usage;
                usage.user = counted.usage_user;
                usage.kernel = counted.usage_sys;
                usage.per_cpu = counted
                    .usage_percpu
                    .split_whitespace()
                    .filter_map(|nanoseconds| nanoseconds.parse().ok())
                    .collect();
            }
            Subsystem::Mem(controller) => {
                let (counted, swap) = (controller.memory_stat(), controller.memswap());
                let memory = metrics.memory.mut_or_insert_default();
                let stat = &counted.stat;
                memory.cache = stat.cache;
                memory.rss = stat.rss;
                memory.rss_huge = stat.rss_huge;
                memory.mapped_file = stat.mapped_file;
                memory.dirty = stat.dirty;
                memory.writeback = stat.writeback;
                memory.pg_pg_in = stat.pgpgin;
                memory.pg_pg_out = stat.pgpgout;
                memory.pg_fault = stat.pgfault;
                memory.pg_maj_fault = stat.pgmajfault;
                memory.inactive_anon = stat.inactive_anon;
                memory.active_anon = stat.active_anon;
                memory.inactive_file = stat.inactive_file;
                memory.active_file = stat.active_file;
                memory.unevictable = stat.unevictable;
                memory.hierarchical_memory_limit = limit(stat.hierarchical_memory_limit);
                memory.hierarchical_swap_limit = limit(stat.hierarchical_memsw_limit);
                memory.total_cache = stat.total_cache;
                memory.total_rss = stat.total_rss;
                memory.total_rss_huge = stat.total_rss_huge;
                memory.total_mapped_file = stat.total_mapped_file;
                memory.total_dirty = stat.total_dirty;
                memory.total_writeback = stat.total_writeback;
                memory.total_pg_pg_in = stat.total_pgpgin;
                memory.total_pg_pg_out = stat.total_pgpgout;
                memory.total_pg_fault = stat.total_pgfault;
                memory.total_pg_maj_fault = stat.total_pgmajfault;
                memory.total_inactive_anon = stat.total_inactive_anon;
                memory.total_active_anon = stat.total_active_anon;
                memory.total_inactive_file = stat.total_inactive_file;
                memory.total_active_file = stat.total_active_file;
                memory.total_unevictable = stat.total_unevictable;
                fill(
                    memory.usage.mut_or_insert_default(),
                    counted.limit_in_bytes,
                    counted.max_usage_in_bytes,
                    counted.fail_cnt,
                );
                fill(
                    memory.swap.mut_or_insert_default(),
                    swap.limit_in_bytes,
                    swap.max_usage_in_bytes,
                    swap.fail_cnt,
                );
                let oom = metrics.memory_oom_control.mut_or_insert_default();
                oom.oom_kill_disable = counted.oom_control.oom_kill_disable.into();
                oom.under_oom = counted.oom_control.under_oom.into();
            }
            _ => {}
        }
    }
}

fn fill(entry: &mut MemoryEntry, limit_in_bytes: i64, max: u64, failcnt: u64) {
    entry.limit = limit(limit_in_bytes);
    entry.max = max;
    entry.failcnt = failcnt;
}

/// cgroups-rs gives -1 for none.
fn limit(bytes: i64) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use cgroups_rs::fs::Hierarchy;
    use cgroups_rs::fs::cpu::CpuController;
    use cgroups_rs::fs::memory::MemController;
    use cgroups_rs::fs::pid::PidController;
    use containerd_shim::protos::cgroups_v2;
    use containerd_shim::protos::protobuf::Message;

    use super::*;

    #[test]
    fn a_live_process_has_statistics_and_a_dead_one_none() {
        let any = collect(std::process::id() as i32).unwrap();
        assert!(any.type_url.starts_with("io.containerd.cgroups.v"), "{}", any.type_url);
        assert!(!any.value.is_empty());
        // The largest pid there can be is 2^22.
        assert!(matches!(collect(1 << 23), Err(MetricsError::Gone { .. })));
    }

    /// The kernel's files of a cgroup v2 in a directory: machines with v1 have no memory controller there.
    #[derive(Debug)]
    struct Fake(PathBuf);

    impl Hierarchy for Fake {
        fn subsystems(&self) -> Vec<Subsystem> {
            let at = || (self.0.clone(), self.0.clone(), true);
            let (cpu, memory, pids) = (at(), at(), at());
            vec![
                Subsystem::Cpu(CpuController::new(cpu.0, cpu.1, cpu.2)),
                Subsystem::Mem(MemController::new(memory.0, memory.1, memory.2)),
                Subsystem::Pid(PidController::new(pids.0, pids.1, pids.2)),
            ]
        }

        fn root(&self) -> PathBuf {
            self.0.clone()
        }

        fn root_control_group(&self) -> Cgroup {
            unreachable!("nobody asks for it")
        }

        fn parent_control_group(&self, _: &str) -> Cgroup {
            unreachable!("nobody asks for it")
        }

        fn v2(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_cgroup_of_version_2_is_told_as_containerds_clients_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir.path().join("pod/container");
        std::fs::create_dir_all(&cgroup).unwrap();
        // As Linux 6.18 writes them.
        for (name, text) in [
            (
                "cpu.stat",
                "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\nnice_usec 0\ncore_sched.force_idle_usec 0\n\
                 nr_periods 7\nnr_throttled 2\nthrottled_usec 90\nnr_bursts 0\nburst_usec 0\n",
            ),
            ("memory.current", "7340032\n"),
            ("memory.peak", "8388608\n"),
            ("memory.max", "max\n"),
            ("memory.high", "max\n"),
            ("memory.low", "0\n"),
            ("memory.min", "0\n"),
            ("memory.swap.current", "4096\n"),
            ("memory.swap.max", "max\n"),
            ("memory.swap.peak", "8192\n"),
            ("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 0\n"),
            (
                "memory.stat",
                "anon 1048576\nfile 6291456\nkernel 40960\nkernel_stack 16384\npagetables 8192\nshmem 5242880\n\
                 file_mapped 4096\ninactive_anon 5242880\nactive_anon 1048576\ninactive_file 524288\nactive_file 524288\n\
                 pgfault 1234\npgmajfault 5\n",
            ),
            ("pids.current", "4\n"),
            ("pids.max", "100\n"),
            (
                "io.stat",
                "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:1 \n254:0 rbytes=10 wbytes=20 rios=3 wios=4 \
                 dbytes=0 dios=0\n",
            ),
        ] {
            std::fs::write(cgroup.join(name), text).unwrap();
        }
        let any = describe(&Cgroup::load(Box::new(Fake(dir.path().to_owned())), "pod/container")).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
        let (cpu, memory, events) = (metrics.cpu(), metrics.memory(), metrics.memory_events());
        assert_eq!(
            (cpu.usage_usec(), cpu.user_usec(), cpu.system_usec(), cpu.nr_throttled()),
            (5000, 3000, 2000, 2)
        );
        assert_eq!((memory.usage(), memory.usage_limit(), memory.max_usage()), (7 << 20, u64::MAX, 8 << 20));
        assert_eq!(
            (memory.shmem(), memory.inactive_file(), memory.pgfault(), memory.pgmajfault()),
            (5 << 20, 1 << 19, 1234, 5)
        );
        assert_eq!((memory.swap_usage(), memory.swap_limit()), (4096, u64::MAX));
        assert_eq!((events.oom(), events.oom_kill(), events.max()), (2, 1, 3));
        assert_eq!((metrics.pids().current(), metrics.pids().limit()), (4, 100));
        let io: Vec<_> = metrics
            .io()
            .usage
            .iter()
            .map(|one| (one.major, one.rbytes, one.wbytes, one.rios, one.wios))
            .collect();
        assert_eq!(io, [(8, 4096, 8192, 1, 2), (7, 0, 0, 0, 0), (254, 10, 20, 3, 4)]);

        std::fs::write(cgroup.join("memory.max"), "10485760\n").unwrap();
        for gone in ["io.stat", "memory.events", "memory.peak"] {
            std::fs::remove_file(cgroup.join(gone)).unwrap();
        }
        let any = describe(&Cgroup::load(Box::new(Fake(dir.path().to_owned())), "pod/container")).unwrap();
        let metrics = cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.memory().usage_limit(), metrics.io.is_some()), (10 << 20, false));
    }
}
