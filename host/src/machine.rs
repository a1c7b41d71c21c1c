//! What this machine has to hold a model in: memory, as far as this process may use it, and NVIDIA's GPUs.

use std::process::Command;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Bytes of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All there is, or as much as a container may have of it.
    pub total: u64,
    /// What can be had now without pushing others out.
    pub free: u64,
}

/// A graphics card with memory of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The maker's name for it.
    pub name: String,
    /// Its memory.
    pub memory: Memory,
}

/// The memory of this machine; `None` where the system does not tell.
pub fn memory() -> Option<Memory> {
    let kind = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(kind);
    let whole = Memory { total: system.total_memory(), free: system.available_memory() };
    let memory = match system.cgroup_limits() {
        Some(limits) if limits.total_memory > 0 && limits.total_memory < whole.total => {
            Memory { total: limits.total_memory, free: limits.free_memory.min(whole.free) }
        }
        _ => whole,
    };
    (memory.total > 0).then_some(memory)
}

/// NVIDIA's GPUs, told by its own tool: this asks for no driver in dylm's build. Apple's share the machine's memory and are not listed.
pub fn gpus() -> Vec<Gpu> {
    let mut tool = Command::new("nvidia-smi");
    tool.args(["--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]);
    let output = tool.output().ok().filter(|output| output.status.success());
    output.map(|output| listed(&String::from_utf8_lossy(&output.stdout))).unwrap_or_default()
}

/// Lines of `name, MiB of all, MiB free`.
fn listed(csv: &str) -> Vec<Gpu> {
    let gpu = |line: &str| {
        let mut fields = line.rsplitn(3, ',').map(str::trim);
        let mut bytes = || fields.next()?.parse::<u64>().ok()?.checked_mul(1 << 20);
        let (free, total) = (bytes()?, bytes()?);
        Some(Gpu { name: fields.next()?.to_owned(), memory: Memory { total, free } })
    };
    csv.lines().filter_map(gpu).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_read_from_what_nvidia_s_tool_prints() {
        let gpus = listed("NVIDIA H200, 143771, 143162\nA, B, 10, 5\nNVIDIA GB10, [N/A], [N/A]\n\n");
        let gpu = |name: &str, total: u64, free: u64| {
            let memory = Memory { total: total << 20, free: free << 20 };
            Gpu { name: name.into(), memory }
        };
        assert_eq!(gpus, [gpu("NVIDIA H200", 143771, 143162), gpu("A, B", 10, 5)]);
    }
}
