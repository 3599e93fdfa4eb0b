//! A file of answers that grows line by line, each line on disk before it counts. What a crash left of half a line is cut off
//! when it is opened again, so that a line is there once and whole, or not there and answered again.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufRead, BufReader, Write},
    path::Path,
};

use crate::openai::{AnsweredLine, BatchUsage};

/// A file of answers.
#[derive(Debug)]
pub struct LineFile {
    file: File,
    bytes: u64,
    num_lines: u64,
    usage: BatchUsage,
}

impl LineFile {
    /// Opens the file at `path`, which is made if it is not there, and adds the custom ids in it to `done`.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open(path: &Path, done: &mut HashSet<String>) -> io::Result<Self> {
        let file = File::options().read(true).append(true).create(true).open(path)?;
        let (mut bytes, mut num_lines, mut usage) = (0, 0, BatchUsage::default());
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        loop {
            line.clear();
            reader.read_until(b'\n', &mut line)?;
            let whole = line.ends_with(b"\n");
            let Some(answer) = serde_json::from_slice::<AnsweredLine>(&line).ok().filter(|_| whole) else { break };
            usage += answer.usage();
            done.insert(answer.custom_id);
            bytes += line.len() as u64;
            num_lines += 1;
        }
        if bytes < file.metadata()?.len() {
            file.set_len(bytes)?;
            file.sync_all()?;
        }
        Ok(Self { file, bytes, num_lines, usage })
    }

    /// Adds one line, which ends with a line feed. It is on disk when this returns; after an error nothing of it is there.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn add(&mut self, line: &[u8]) -> io::Result<()> {
        if let Err(error) = self.file.write_all(line).and_then(|()| self.file.sync_data()) {
            // What stays of the line all the same is cut off when the file is opened again.
            let _ = self.file.set_len(self.bytes);
            return Err(error);
        }
        self.bytes += line.len() as u64;
        self.num_lines += 1;
        self.usage +=
            serde_json::from_slice(line).map_or_else(|_| BatchUsage::default(), |line: AnsweredLine| line.usage());
        Ok(())
    }

    /// Bytes in it.
    pub fn num_bytes(&self) -> u64 {
        self.bytes
    }

    /// Tokens of the answers in it.
    pub fn usage(&self) -> BatchUsage {
        self.usage
    }

    /// Lines in it.
    pub fn num_lines(&self) -> u64 {
        self.num_lines
    }
}
