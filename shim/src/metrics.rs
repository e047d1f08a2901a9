//! A container's statistics as containerd's messages for cgroup v1 and v2.
//!
//! containerd-shim collects them; of v1 it leaves out what cpuacct counts (so that CPU usage is zero) and most of memory, which
//! is added here from the same cgroups-rs values.

use std::io;
use std::path::Path;

use cgroups_rs::fs::{Cgroup, Subsystem};
use containerd_shim::cgroup::{collect_metrics, collect_metrics_v2, get_cgroup};
use containerd_shim::protos::cgroups::metrics::{MemoryEntry, Metrics};
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
    let cgroup = get_cgroup(pid.unsigned_abs()).map_err(read)?;
    let any = if cgroup.v2() {
        convert_to_any(Box::new(collect_metrics_v2(&cgroup).map_err(read)?))
    } else {
        let mut metrics = collect_metrics(&cgroup).map_err(read)?;
        complete(&mut metrics, &cgroup);
        convert_to_any(Box::new(metrics))
    };
    any.map_err(read)
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
    use super::*;

    #[test]
    fn a_live_process_has_statistics_and_a_dead_one_none() {
        let any = collect(std::process::id() as i32).unwrap();
        assert!(any.type_url.starts_with("io.containerd.cgroups.v"), "{}", any.type_url);
        assert!(!any.value.is_empty());
        // The largest pid there can be is 2^22.
        assert!(matches!(collect(1 << 23), Err(MetricsError::Gone { .. })));
    }
}
