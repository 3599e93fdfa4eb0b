//! What fits: how many KV blocks there are, from the memory limit, the weights and the caches. Pure arithmetic, plus the
//! one function that asks the machine.

use std::{fs, path::Path};

use super::ConfigError;

/// Bytes a process needs besides what is counted: code, stacks, tokenizer, connections.
const PROCESS_BYTES: u64 = 24 << 20;
/// Full contexts the KV cache holds when nothing says otherwise and they fit.
const DEFAULT_CONTEXTS: u64 = 4;

/// What the memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRequest {
    /// Most bytes the process may use; `None`: no limit is known.
    pub limit_bytes: Option<u64>,
    /// Resident weights.
    pub weights_bytes: u64,
    /// Activations and other working memory.
    pub scratch_bytes: u64,
    /// Largest response cache.
    pub response_cache_bytes: u64,
    /// Bytes of one KV block.
    pub block_bytes: u64,
    /// Positions in one KV block.
    pub block_tokens: u64,
    /// Positions of one full context.
    pub ctx_size: u64,
    /// KV memory as set; `None`: room for four full contexts if they fit, fewer if not.
    pub kv_cache_bytes: Option<u64>,
}

/// How the memory is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Blocks of the KV cache; one full context at least.
    pub num_kv_blocks: u64,
    /// Their bytes.
    pub kv_cache_bytes: u64,
    /// Everything together, the process included.
    pub total_bytes: u64,
}

/// Divides the memory.
///
/// # Errors
/// [`ConfigError::DoesNotFit`] when one full context does not fit the limit; [`ConfigError::Invalid`] when
/// `--kv-cache-mb` holds less than one.
pub fn memory_plan(request: &MemoryRequest) -> Result<MemoryPlan, ConfigError> {
    let blocks_per_context = request.ctx_size.div_ceil(request.block_tokens.max(1)).max(1);
    let context_bytes = blocks_per_context.saturating_mul(request.block_bytes);
    let fixed_bytes = [PROCESS_BYTES, request.weights_bytes, request.scratch_bytes, request.response_cache_bytes]
        .into_iter()
        .fold(0_u64, u64::saturating_add);
    let block_bytes = request.block_bytes.max(1);

    let wanted_blocks = match request.kv_cache_bytes {
        Some(bytes) if bytes < context_bytes => {
            return Err(ConfigError::Invalid {
                setting: "kv-cache-mb",
                value: (bytes >> 20).to_string(),
                reason: format!(
                    "one context of {} tokens needs {} MiB: raise it or lower --ctx-size",
                    request.ctx_size,
                    mib(context_bytes)
                ),
            });
        }
        Some(bytes) => bytes / block_bytes,
        None => blocks_per_context.saturating_mul(DEFAULT_CONTEXTS),
    };
    // What was asked for in so many words must fit whole; the default takes what there is.
    let smallest_blocks = if request.kv_cache_bytes.is_some() { wanted_blocks } else { blocks_per_context };
    let needed_bytes = fixed_bytes.saturating_add(smallest_blocks.saturating_mul(block_bytes));
    let num_kv_blocks = match request.limit_bytes {
        None => wanted_blocks,
        Some(limit) if needed_bytes > limit => {
            return Err(ConfigError::DoesNotFit {
                needed_mib: mib(needed_bytes),
                breakdown: format!(
                    "weights {}, KV cache {}, response cache {}, working memory {}",
                    mib(request.weights_bytes),
                    mib(smallest_blocks.saturating_mul(block_bytes)),
                    mib(request.response_cache_bytes),
                    mib(request.scratch_bytes.saturating_add(PROCESS_BYTES)),
                ),
                limit_mib: limit >> 20,
            });
        }
        Some(limit) => wanted_blocks.min((limit - fixed_bytes) / block_bytes),
    };
    let kv_cache_bytes = num_kv_blocks.saturating_mul(block_bytes);
    Ok(MemoryPlan { num_kv_blocks, kv_cache_bytes, total_bytes: fixed_bytes.saturating_add(kv_cache_bytes) })
}

/// The smaller of what the container allows (cgroup v2 or v1) and what the machine has; `None` where neither is told.
pub fn detected_memory_limit() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| parse_mem_total(&text));
    let container =
        fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| cgroup_limit(&text, Path::new("/sys/fs/cgroup")));
    [machine, container].into_iter().flatten().min()
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn parse_mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// The smallest limit from this process's group up to the root. Inside a container the path of `/proc/self/cgroup` may
/// not exist below the mount; the mount's own root is then the container's group, and is always looked at.
fn cgroup_limit(proc_self_cgroup: &str, root: &Path) -> Option<u64> {
    let mut limits = Vec::new();
    for line in proc_self_cgroup.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (mount, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            v1 if v1.split(',').any(|name| name == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => continue,
        };
        let group = mount.join(path.trim_start_matches('/'));
        let groups = group.ancestors().take_while(|group| group.starts_with(&mount));
        limits.extend(groups.filter_map(|group| read_limit(&group.join(file))));
    }
    limits.into_iter().min()
}

/// A limit file's number; `max` and v1's "about 2^63" mean none.
fn read_limit(file: &Path) -> Option<u64> {
    let bytes: u64 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
    (bytes < 1 << 60).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_of_the_groups_above_counts() {
        let root = std::env::temp_dir().join(format!("bitnet-cgroup-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let file = root.join(path);
            fs::create_dir_all(file.parent().expect("a folder")).expect("writable");
            fs::write(file, text).expect("writable");
        };
        write("memory.max", "max\n");
        write("a/memory.max", "1000\n");
        write("a/b/memory.max", "2000\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/c/memory.limit_in_bytes", "3000\n");
        let limit = |text: &str| cgroup_limit(text, &root);
        assert_eq!(limit("0::/a/b\n"), Some(1000));
        assert_eq!(limit("0::/\n"), None);
        assert_eq!(limit("12:cpu,cpuacct:/c\n5:memory:/c\n"), Some(3000));
        assert_eq!(limit("5:memory:/only/outside/the/container\n"), None);
        write("memory.max", "500\n");
        assert_eq!(limit("0::/only/outside/the/container\n"), Some(500), "the mount's root is the container's group");
        fs::remove_dir_all(&root).expect("removable");
    }

    #[test]
    fn the_machines_memory_is_read() {
        assert_eq!(parse_mem_total("MemTotal:       16 kB\nMemFree: 1 kB\n"), Some(16384));
        assert_eq!(parse_mem_total("nothing"), None);
    }
}
