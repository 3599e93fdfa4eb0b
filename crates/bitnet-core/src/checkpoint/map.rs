//! Read-only memory mapping of model files: the one file of `checkpoint` with unsafe code.
//!
//! A [`MappedBytes`] is a checked range of a mapping, cheap to clone, that can hand its pages back to the kernel
//! ([`MappedBytes::release`]) once the weights in it have been repacked.
#![allow(unsafe_code)]

use std::{fs::File, io, ops::Range, path::Path, sync::Arc};

use memmap2::{Mmap, UncheckedAdvice};

/// A range of a read-only file mapping.
#[derive(Clone, Debug)]
pub struct MappedBytes {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl MappedBytes {
    /// Maps the whole of `path`.
    ///
    /// # Errors
    /// What the operating system says when the file cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the mapping is private and read-only. A file truncated or rewritten while it is served is outside what
        // a mapping can defend against; the documentation asks for model files that are replaced, never edited.
        let map = unsafe { Mmap::map(&file)? };
        let range = 0..map.len();
        Ok(Self { map: Arc::new(map), range })
    }

    /// The part `range` of these bytes, or `None` when it reaches beyond them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let start = self.range.start.checked_add(range.start)?;
        let end = self.range.start.checked_add(range.end)?;
        (start <= end && end <= self.range.end).then(|| Self { map: Arc::clone(&self.map), range: start..end })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// Gives the pages wholly inside this range back to the kernel. The bytes stay readable: the next access reads
    /// the file again.
    pub fn release(&self) {
        const PAGE: usize = 4096;
        let start = self.range.start.next_multiple_of(PAGE);
        let end = self.range.end / PAGE * PAGE;
        if start < end {
            // SAFETY: the mapping is private, read-only and file-backed, so dropped pages come back from the file
            // with the same contents. Advice that the kernel refuses changes nothing, so the result is not needed.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}
