//! What the operating system says about the server's process.

use std::fs;

/// A process to look at.
#[derive(Clone, Copy, Debug)]
pub struct Process(pub u32);

impl Process {
    /// Bytes of anonymous memory, swapped out or not: what a leak would raise.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn anonymous_bytes(self) -> u64 {
        (self.status("RssAnon:") + self.status("VmSwap:")) * 1024
    }

    /// Open descriptors.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn num_descriptors(self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.0)).expect("the process lives").count()
    }

    /// Threads.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn num_threads(self) -> u64 {
        self.status("Threads:")
    }

    /// The id of the thread whose name begins with `name`.
    ///
    /// # Panics
    /// When there is none.
    pub fn thread(self, name: &str) -> i32 {
        let threads = fs::read_dir(format!("/proc/{}/task", self.0)).expect("the process lives");
        let is_named = |path: &std::path::Path| {
            fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim_end().starts_with(name))
        };
        let found = threads.flatten().find(|entry| is_named(&entry.path())).expect("a thread of this name");
        found.file_name().to_str().and_then(|id| id.parse().ok()).expect("a number")
    }

    fn status(self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0)).expect("the process lives");
        let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a field of every process");
        line.split_whitespace().next().and_then(|value| value.parse().ok()).expect("a number")
    }
}
