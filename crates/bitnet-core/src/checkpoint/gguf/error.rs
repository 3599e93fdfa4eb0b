//! What can be wrong with a GGUF container.

/// Why bytes are no GGUF file that can be used.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The first four bytes are not `GGUF`: another kind of file, or a download page saved under this name.
    #[error("not a GGUF file (it does not start with the letters GGUF)")]
    NotGguf,
    /// Version 1, a future one, or a big-endian file.
    #[error("GGUF version {version} is not supported, only 2 and 3 (a huge number means a big-endian file)")]
    Version {
        /// As read.
        version: u32,
    },
    /// The bytes end before the thing does: usually a download that was cut short, else a corrupt length.
    #[error("the file ends inside {what} at byte {offset}: cut short, or a corrupt length")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it began.
        offset: usize,
    },
    /// A count beyond what any model needs.
    #[error("{found} {what}, more than the {limit} that are accepted")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// As read.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A key, name or string is not UTF-8.
    #[error("{what} at byte {offset} is not UTF-8")]
    Utf8 {
        /// What was being read.
        what: &'static str,
        /// Where it began.
        offset: usize,
    },
    /// The same key twice: which one counts would depend on the reader.
    #[error("metadata key `{key}` occurs twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// The same tensor twice.
    #[error("tensor `{tensor}` occurs twice")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },
    /// A value type that does not exist, or an array of arrays.
    #[error("metadata key `{key}` has value type {id}{inside}, which is not supported")]
    ValueType {
        /// The key.
        key: String,
        /// As read.
        id: u32,
        /// ` inside an array` or nothing.
        inside: &'static str,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("metadata key `{key}` is a boolean of value {found}")]
    Bool {
        /// The key.
        key: String,
        /// As read.
        found: u8,
    },
    /// `general.alignment` is no sane power of two.
    #[error("general.alignment is {found}, not a power of two from 8 to 65536")]
    Alignment {
        /// As read; `None` when it is no unsigned integer.
        found: String,
    },
    /// More dimensions than ggml has.
    #[error("tensor `{tensor}` has {found} dimensions, more than 4")]
    Dimensions {
        /// The name.
        tensor: String,
        /// As read.
        found: u32,
    },
    /// A dimension of zero, or a product beyond 64 bits, or rows that are not whole blocks of the type.
    #[error("tensor `{tensor}` of type {kind} cannot have the shape {dimensions:?}")]
    Shape {
        /// The name.
        tensor: String,
        /// Its type.
        kind: &'static str,
        /// As read, contiguous dimension first.
        dimensions: Vec<u64>,
    },
    /// A tensor type that nobody uses.
    #[error("tensor `{tensor}` has the unknown type {id}")]
    TensorType {
        /// The name.
        tensor: String,
        /// As read.
        id: u32,
    },
    /// An offset that is no multiple of the alignment.
    #[error("tensor `{tensor}` starts at offset {offset}, not a multiple of the alignment {alignment}")]
    Misaligned {
        /// The name.
        tensor: String,
        /// As read, from the start of the data.
        offset: u64,
        /// In force.
        alignment: u64,
    },
    /// The data does not lie inside the file: usually a download that was cut short.
    #[error(
        "tensor `{tensor}` needs {bytes} bytes at offset {offset}, but the data is {available} bytes long: the file is cut short, or the table is corrupt"
    )]
    OutOfFile {
        /// The name.
        tensor: String,
        /// As read, from the start of the data.
        offset: u64,
        /// By shape and type.
        bytes: u64,
        /// Bytes of data in the file.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors `{first}` and `{second}` overlap")]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The one that starts inside it.
        second: String,
    },
}
