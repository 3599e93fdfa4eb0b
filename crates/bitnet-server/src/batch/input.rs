//! The lines of an input file: checked all at once, then read one by one.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufRead, BufReader, Read},
};

use crate::openai::{BatchEndpoint, BatchError, InputLine};

/// Lines of one file.
const MAX_LINES: u64 = 50_000;
/// Bytes of a custom id.
const MAX_ID_BYTES: usize = 256;
/// Wrong lines that are told; the rest is not looked at.
const MAX_ERRORS: usize = 20;

/// Reads lines, each no longer than a request body may be.
#[derive(Debug)]
pub(super) struct Lines {
    reader: BufReader<File>,
    max_bytes: usize,
    /// Of the line that was read last, from 1.
    number: u64,
}

impl Lines {
    pub(super) fn new(file: File, max_bytes: usize) -> Self {
        Self { reader: BufReader::new(file), max_bytes, number: 0 }
    }

    /// The next line that is not blank; `Err` inside when it is not what it should be.
    pub(super) fn next(&mut self) -> io::Result<Option<Result<InputLine, BatchError>>> {
        loop {
            let mut line = Vec::new();
            self.number += 1;
            let room = self.max_bytes as u64 + 1;
            if self.reader.by_ref().take(room).read_until(b'\n', &mut line)? == 0 {
                return Ok(None);
            }
            if line.len() > self.max_bytes {
                self.reader.skip_until(b'\n')?;
                let message = format!("The line is longer than the {} bytes allowed.", self.max_bytes);
                return Ok(Some(Err(self.error("invalid_line", None, message))));
            }
            if !line.trim_ascii().is_empty() {
                return Ok(Some(self.parse(&line)));
            }
        }
    }

    fn parse(&self, line: &[u8]) -> Result<InputLine, BatchError> {
        let line: InputLine = serde_json::from_slice(line).map_err(|error| {
            let message = format!("The line is no batch request in JSON: {error}.");
            self.error("invalid_json_line", None, message)
        })?;
        if line.method != "POST" {
            return Err(self.error("invalid_method", Some("method"), "'method' must be POST.".to_owned()));
        }
        if line.custom_id.is_empty() || line.custom_id.len() > MAX_ID_BYTES {
            let message = format!("'custom_id' must have 1 to {MAX_ID_BYTES} bytes.");
            return Err(self.error("invalid_custom_id", Some("custom_id"), message));
        }
        if !line.body.get().starts_with('{') {
            return Err(self.error("invalid_body", Some("body"), "'body' must be an object.".to_owned()));
        }
        Ok(line)
    }

    fn error(&self, code: &str, param: Option<&str>, message: String) -> BatchError {
        BatchError { code: code.to_owned(), message, param: param.map(str::to_owned), line: Some(self.number) }
    }
}

/// Reads all of `lines`: how many there are, or what is wrong with them. `endpoint`: where all of them must go.
pub(super) fn check(mut lines: Lines, endpoint: Option<BatchEndpoint>) -> io::Result<Result<u64, Vec<BatchError>>> {
    let (mut total, mut ids, mut errors) = (0, HashSet::new(), Vec::new());
    while let Some(line) = lines.next()? {
        total += 1;
        match line {
            Err(error) => errors.push(error),
            Ok(line) if endpoint.is_some_and(|endpoint| endpoint != line.url) => {
                let message = "'url' is not the endpoint of the batch.".to_owned();
                errors.push(lines.error("mismatched_url", Some("url"), message));
            }
            Ok(line) => {
                if !ids.insert(line.custom_id) {
                    let message = "'custom_id' was used by an earlier line.".to_owned();
                    errors.push(lines.error("duplicate_custom_id", Some("custom_id"), message));
                }
            }
        }
        if total > MAX_LINES {
            let message = format!("A batch may have {MAX_LINES} lines.");
            errors.push(lines.error("too_many_lines", None, message));
            return Ok(Err(errors));
        }
        if errors.len() >= MAX_ERRORS {
            return Ok(Err(errors));
        }
    }
    if total == 0 {
        let message = "The file holds no lines.".to_owned();
        errors.push(BatchError { code: "empty_file".to_owned(), message, param: None, line: None });
    }
    Ok(if errors.is_empty() { Ok(total) } else { Err(errors) })
}
