//! Read-only memory mapping of model files: the one file of `checkpoint` with unsafe code.
//!
//! A [`MappedBytes`] is a checked range of a mapping, cheap to clone, that can hand its pages back to the kernel
//! ([`MappedBytes::release`]) once the weights in it have been repacked. A model compiled into the program, or built in
//! memory, looks the same.
#![allow(unsafe_code)]

use std::{borrow::Cow, fs::File, io, ops::Range, path::Path, sync::Arc};

use memmap2::{Mmap, UncheckedAdvice};

/// A range of a read-only file mapping, or of bytes in memory.
#[derive(Clone, Debug)]
pub struct MappedBytes {
    backing: Arc<Backing>,
    range: Range<usize>,
}

#[derive(Debug)]
enum Backing {
    File(Mmap),
    Memory(Cow<'static, [u8]>),
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
        Ok(Self { range: 0..map.len(), backing: Arc::new(Backing::File(map)) })
    }

    /// Bytes that are in memory already.
    pub fn from_memory(bytes: Cow<'static, [u8]>) -> Self {
        Self { range: 0..bytes.len(), backing: Arc::new(Backing::Memory(bytes)) }
    }

    /// The part `range` of these bytes, or `None` when it reaches beyond them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let start = self.range.start.checked_add(range.start)?;
        let end = self.range.start.checked_add(range.end)?;
        (start <= end && end <= self.range.end).then(|| Self { backing: Arc::clone(&self.backing), range: start..end })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match &*self.backing {
            Backing::File(map) => &map[self.range.clone()],
            Backing::Memory(bytes) => &bytes[self.range.clone()],
        }
    }

    /// Gives the pages wholly inside this range back to the kernel, if they are a file's. The bytes stay readable: the
    /// next access reads the file again.
    pub fn release(&self) {
        const PAGE: usize = 4096;
        let Backing::File(map) = &*self.backing else { return };
        let start = self.range.start.next_multiple_of(PAGE);
        let end = self.range.end & !(PAGE - 1);
        if let Some(length) = end.checked_sub(start).filter(|&length| length > 0) {
            // SAFETY: the mapping is private, read-only and file-backed, so dropped pages come back from the file
            // with the same contents. Advice that the kernel refuses changes nothing, so the result is not needed.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, length) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_stay_inside_and_survive_a_release() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let expected = std::fs::read(&path).unwrap();
        for bytes in [MappedBytes::open(&path).unwrap(), MappedBytes::from_memory(expected.clone().into())] {
            let part = bytes.slice(3..20).unwrap();
            part.release();
            assert_eq!(part.bytes(), &expected[3..20]);
            assert_eq!(part.slice(2..5).unwrap().bytes(), &expected[5..8]);
            assert!(
                part.slice(0..18).is_none()
                    && part.slice(Range { start: 9, end: 8 }).is_none()
                    && part.slice(1..usize::MAX).is_none()
            );
            bytes.release();
            assert_eq!(bytes.bytes(), expected);
        }
    }
}
