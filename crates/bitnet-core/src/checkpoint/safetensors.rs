//! The safetensors container: bytes -> [`Header`], a checked tensor table. What names mean is not known here.
//!
//! A file is eight bytes of header length, a JSON object, and the data. The JSON is read straight into the table, one
//! entry at a time, so that memory follows the entries and not what a hostile header claims.

use std::{collections::HashSet, fmt, ops::Range};

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::gguf::{MAX_NAME_BYTES, MAX_TENSORS};

/// Longest header accepted, as in the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;

/// The checked tensor table of one file.
#[derive(Clone, Debug)]
pub struct Header {
    /// The tensors in the order of the header.
    pub tensors: Vec<TensorEntry>,
}

/// One tensor, checked against the file.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Where the data lies in the file.
    pub range: Range<usize>,
}

/// Element types of the format: a name and a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dtype {
    /// Name in the file.
    pub name: &'static str,
    /// Bytes of one element.
    pub bytes: u64,
}

/// Why bytes are no safetensors file that can be used.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    /// Not even the header length is there: an empty file, or a pointer file of a large-file store.
    #[error("not a safetensors file: only {len} bytes long")]
    TooShort {
        /// Length of the file.
        len: usize,
    },
    /// The header length is beyond the file or the limit: a file cut short, or of another kind.
    #[error("the header claims {found} bytes, but only {available} can follow: cut short, or not a safetensors file")]
    HeaderLength {
        /// As read.
        found: u64,
        /// Bytes that are there, at most the limit.
        available: u64,
    },
    /// The header is not the JSON it has to be.
    #[error("the header is not valid: {0}")]
    Header(serde_json::Error),
    /// A dimension of zero, or a product beyond 64 bits.
    #[error("tensor `{tensor}` cannot have the shape {shape:?}")]
    Shape {
        /// Its name.
        tensor: String,
        /// As read.
        shape: Vec<u64>,
    },
    /// The offsets do not span what shape and type need.
    #[error("tensor `{tensor}` has {found} bytes between its offsets, but its shape and type need {expected}")]
    Size {
        /// Its name.
        tensor: String,
        /// By shape and type.
        expected: u64,
        /// By the offsets.
        found: u64,
    },
    /// The data does not lie inside the file: usually a download that was cut short.
    #[error(
        "tensor `{tensor}` ends at offset {end}, but the data is {available} bytes long: the file is cut short, or the header is corrupt"
    )]
    OutOfFile {
        /// Its name.
        tensor: String,
        /// As read, from the start of the data.
        end: u64,
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

/// Reads the header and checks that each tensor's data lies inside `bytes`, apart from the others.
///
/// # Errors
/// [`SafetensorsError`].
pub fn parse(bytes: &[u8]) -> Result<Header, SafetensorsError> {
    let (length, rest) = bytes.split_first_chunk().ok_or(SafetensorsError::TooShort { len: bytes.len() })?;
    let found = u64::from_le_bytes(*length);
    let available = (rest.len() as u64).min(MAX_HEADER_BYTES);
    if found > available {
        return Err(SafetensorsError::HeaderLength { found, available });
    }
    let (json, data) = rest.split_at(found as usize);
    let RawHeader(entries) = serde_json::from_slice(json).map_err(SafetensorsError::Header)?;
    let data_start = bytes.len().saturating_sub(data.len());
    let place = |entry| place(entry, data_start, data.len() as u64);
    let tensors = entries.into_iter().map(place).collect::<Result<Vec<_>, _>>()?;
    refuse_overlaps(&tensors)?;
    Ok(Header { tensors })
}

/// Turns the offsets of an entry into a checked range of the file.
fn place((name, raw): (String, RawEntry), data_start: usize, available: u64) -> Result<TensorEntry, SafetensorsError> {
    let RawEntry { dtype, shape: Shape(shape), data_offsets: (start, end) } = raw;
    let elements = shape.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension));
    let expected = elements.and_then(|elements| elements.checked_mul(dtype.bytes)).filter(|&bytes| bytes > 0);
    let Some(expected) = expected else { return Err(SafetensorsError::Shape { tensor: name, shape }) };
    if end > available {
        return Err(SafetensorsError::OutOfFile { tensor: name, end, available });
    }
    match end.checked_sub(start) {
        Some(found) if found == expected => {}
        found => return Err(SafetensorsError::Size { tensor: name, expected, found: found.unwrap_or(0) }),
    }
    // Both lie inside the data, which is part of a slice.
    let range = data_start.saturating_add(start as usize)..data_start.saturating_add(end as usize);
    Ok(TensorEntry { name, dtype, shape, range })
}

fn refuse_overlaps(tensors: &[TensorEntry]) -> Result<(), SafetensorsError> {
    let mut by_start: Vec<&TensorEntry> = tensors.iter().collect();
    by_start.sort_unstable_by_key(|tensor| tensor.range.start);
    match by_start.array_windows().find(|[first, second]| first.range.end > second.range.start) {
        Some([first, second]) => {
            Err(SafetensorsError::Overlap { first: first.name.clone(), second: second.name.clone() })
        }
        None => Ok(()),
    }
}

/// The header as JSON has it, names checked to be different.
struct RawHeader(Vec<(String, RawEntry)>);

#[derive(serde::Deserialize)]
struct RawEntry {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries: Vec<(String, RawEntry)> = Vec::new();
                let mut names = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name.len() > MAX_NAME_BYTES || names.len() as u64 >= MAX_TENSORS {
                        return Err(de::Error::custom("more tensors, or a longer name, than any model has"));
                    }
                    if !names.insert(name.clone()) {
                        return Err(de::Error::custom(format_args!("`{name}` occurs twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let entry = map.next_value()?;
                        entries.push((name, entry));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DIMENSIONS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = seq.next_element()? {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(de::Error::invalid_length(MAX_DIMENSIONS, &self));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}

impl<'de> Deserialize<'de> for Dtype {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known = DTYPES.iter().find(|dtype| dtype.name == name);
        known.copied().ok_or_else(|| de::Error::custom(format_args!("unknown dtype `{name}`")))
    }
}

const fn dtype(name: &'static str, bytes: u64) -> Dtype {
    Dtype { name, bytes }
}

const DTYPES: &[Dtype] = &[
    dtype("BOOL", 1),
    dtype("U8", 1),
    dtype("I8", 1),
    dtype("F8_E4M3", 1),
    dtype("F8_E5M2", 1),
    dtype("U16", 2),
    dtype("I16", 2),
    dtype("F16", 2),
    dtype("BF16", 2),
    dtype("U32", 4),
    dtype("I32", 4),
    dtype("F32", 4),
    dtype("U64", 8),
    dtype("I64", 8),
    dtype("F64", 8),
];
