//! Stdout, whose reader may have had enough: `bitnet inspect -m MODEL | head` ends without a word.

use std::{
    fmt,
    io::{self, Write as _},
};

use crate::exit::Failure;

/// Writes `text`, and nothing of it stays behind.
///
/// # Errors
/// The end of the process, a quiet one when nobody reads any more.
pub(crate) fn write(text: fmt::Arguments<'_>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_fmt(text).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::quiet(),
        _ => Failure::terminal(error),
    })
}

/// [`write`] of a line.
///
/// # Errors
/// As there.
pub(crate) fn write_line(line: impl fmt::Display) -> Result<(), Failure> {
    write(format_args!("{line}\n"))
}
