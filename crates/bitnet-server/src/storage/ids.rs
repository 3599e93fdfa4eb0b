//! Names of stored things: a prefix and 32 hexadecimal digits, drawn here. What comes from outside is only compared with them.

const DIGITS: usize = 32;
const FILE: &str = "file-";
const BATCH: &str = "batch_";

/// A new file's id.
pub(super) fn file() -> String {
    format!("{FILE}{:032x}", rand::random::<u128>())
}

/// A new batch's id.
pub(super) fn batch() -> String {
    format!("{BATCH}{:032x}", rand::random::<u128>())
}

/// Whether `id` was made here, so that it may be part of a path.
pub(super) fn is_ours(id: &str) -> bool {
    let digits = id.strip_prefix(FILE).or_else(|| id.strip_prefix(BATCH));
    digits.is_some_and(|digits| {
        digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    })
}

/// What of an id from outside a message repeats.
pub(super) fn shown(id: &str) -> String {
    id.chars().take(80).collect()
}
