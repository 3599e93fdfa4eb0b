//! Which CPUs this process may use: affinity mask, SMT siblings, cgroup quota. Linux only; elsewhere the standard
//! library's count is taken and nothing is pinned.

use std::{fs, num::NonZero, path::Path, thread};

/// Physical cores this process may use: affinity mask and cgroup quota respected, at least 1.
pub fn default_num_threads() -> usize {
    let cores = allowed_cores();
    let quota =
        fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| cgroup_quota(&text, Path::new(CGROUP_ROOT)));
    quota.map_or(cores, |cpus| cores.min(cpus)).max(1)
}

/// CPUs in the affinity mask: one of each physical core first, then their SMT siblings. Empty when unknown.
fn allowed() -> Vec<usize> {
    let (mut first, siblings): (Vec<_>, Vec<_>) = affinity().into_iter().partition(|&cpu| leads_its_core(cpu));
    first.extend(siblings);
    first
}

/// The CPUs to pin `num_threads` workers to: one of each core when they take every core this process may use. With fewer
/// workers than cores another process may have chosen the same ones, and with more the scheduler knows better: then none.
pub(super) fn own(num_threads: usize) -> Vec<usize> {
    let cpus = allowed();
    if num_threads == allowed_cores() && num_threads <= cpus.len() { cpus } else { Vec::new() }
}

fn allowed_cores() -> usize {
    let mask = affinity();
    // A mask may hold a second sibling without its first, so cores are counted by their leader, not by leaders present.
    let mut leaders: Vec<usize> = mask.iter().map(|&cpu| core_leader(cpu)).collect();
    leaders.sort_unstable();
    leaders.dedup();
    if leaders.is_empty() { thread::available_parallelism().map_or(1, NonZero::get) } else { leaders.len() }
}

fn leads_its_core(cpu: usize) -> bool {
    core_leader(cpu) == cpu
}

/// The lowest CPU of the same physical core; `cpu` itself when the system does not say.
fn core_leader(cpu: usize) -> usize {
    let list = fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
    list.ok().and_then(|list| list.split([',', '-']).next()?.trim().parse().ok()).unwrap_or(cpu)
}

#[cfg(target_os = "linux")]
fn affinity() -> Vec<usize> {
    // SAFETY: all zeroes is a valid (empty) CPU set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer and the size describe `set`; 0 is the calling thread.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } != 0 {
        return Vec::new();
    }
    let limit = usize::try_from(libc::CPU_SETSIZE).unwrap_or(0);
    // SAFETY: every index is below the capacity of the set.
    (0..limit).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
}

#[cfg(not(target_os = "linux"))]
fn affinity() -> Vec<usize> {
    Vec::new()
}

/// Binds the calling thread to one CPU. A refusal costs speed, not correctness.
#[cfg(target_os = "linux")]
pub(super) fn pin_current_thread(cpu: usize) {
    // SAFETY: all zeroes is a valid (empty) CPU set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` came out of a set of the same capacity.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer and the size describe `set`; 0 is the calling thread.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } != 0 {
        tracing::debug!(cpu, error = %std::io::Error::last_os_error(), "cannot pin a worker");
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn pin_current_thread(_cpu: usize) {}

const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// CPUs granted by the tightest quota on the way from this process's cgroup to the root, rounded up. `membership` is
/// `/proc/self/cgroup`: lines `id:controllers:path`, no controllers for version 2.
pub(super) fn cgroup_quota(membership: &str, root: &Path) -> Option<usize> {
    let mut tightest = None;
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let mount = if controllers.is_empty() {
            root.to_path_buf()
        } else if controllers.split(',').any(|name| name == "cpu") {
            // Mounted under the joined name, with the single name a link to it; containers sometimes have only one.
            [controllers, "cpu"].map(|name| root.join(name)).into_iter().find(|p| p.is_dir()).unwrap_or_default()
        } else {
            continue;
        };
        // In a container the path may be the host's while the mount shows only our part: the root of the mount is
        // always looked at too.
        for ancestor in Path::new(path.trim_start_matches('/')).ancestors() {
            let granted = directory_quota(&mount.join(ancestor));
            tightest = [tightest, granted].into_iter().flatten().min();
        }
    }
    tightest
}

/// The quota of one cgroup directory, either version.
fn directory_quota(directory: &Path) -> Option<usize> {
    let read = |name: &str| fs::read_to_string(directory.join(name)).ok();
    let text = read("cpu.max").or_else(|| Some(read("cpu.cfs_quota_us")? + " " + &read("cpu.cfs_period_us")?))?;
    let mut numbers = text.split_whitespace().map(|number| number.parse::<i64>().ok());
    let (quota, period) = (numbers.next()??, numbers.next()??);
    // No limit is written `max` (version 2) or -1 (version 1).
    (quota > 0 && period > 0)
        .then(|| usize::try_from(quota.unsigned_abs().div_ceil(period.unsigned_abs())).unwrap_or(usize::MAX))
}
