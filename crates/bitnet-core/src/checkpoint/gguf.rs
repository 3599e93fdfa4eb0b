//! The GGUF container: bytes -> [`Gguf`], a checked header, metadata and tensor table that borrow the bytes.
//!
//! Nothing here knows what a key or a tensor means (`gguf_model.rs` does). The file is believed in nothing: every length
//! is compared with the bytes that are left before it is used, every sum and product is checked, and nothing is
//! allocated in proportion to a number that the file merely states. Tensor data is never touched.

mod error;
mod kinds;

use std::{collections::BTreeMap, ops::Range};

pub use error::GgufError;
pub use kinds::TensorKind;
use kinds::{KINDS, Size};

/// Most tensors a file may list; the deepest model accepted needs about 18,000.
pub const MAX_TENSORS: u64 = 32_768;

/// Most metadata keys a file may have; published files have a few dozen.
pub const MAX_KEYS: u64 = 4_096;

/// Longest key or tensor name, in bytes.
pub const MAX_NAME_BYTES: usize = 1_024;

/// Most dimensions of a tensor.
pub const MAX_DIMENSIONS: u32 = 4;

/// Alignments accepted: powers of two in this range.
pub const ALIGNMENTS: std::ops::RangeInclusive<u64> = 8..=65_536;

/// A parsed GGUF file, borrowing its bytes.
#[derive(Clone, Debug)]
pub struct Gguf<'a> {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<&'a str, Value<'a>>,
    /// The tensors in the order of the table.
    pub tensors: Vec<TensorInfo<'a>>,
}

/// A metadata value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Either float.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    Str(&'a str),
    /// An array of one scalar type or of strings.
    Array(Array<'a>),
}

/// An array whose elements have been checked to lie inside the file, but are decoded only when asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    element: Scalar,
    len: usize,
    bytes: &'a [u8],
}

/// The types a value or an array element can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scalar {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    U64,
    I64,
    F64,
}

/// One row of the tensor table, checked against the file.
#[derive(Clone, Debug)]
pub struct TensorInfo<'a> {
    /// Name.
    pub name: &'a str,
    /// Sizes, the contiguous dimension first; `num_dimensions` of them count, the others are 1.
    pub dimensions: [u64; MAX_DIMENSIONS as usize],
    /// How many dimensions the file states; 0 is a scalar.
    pub num_dimensions: usize,
    /// Type.
    pub kind: &'static TensorKind,
    /// Where the data lies in the file.
    pub range: Range<usize>,
}

/// Reads header, metadata and tensor table, and checks that each tensor's data lies inside `bytes`, apart from the others.
///
/// # Errors
/// [`GgufError`]; the first defect in file order.
pub fn parse(bytes: &[u8]) -> Result<Gguf<'_>, GgufError> {
    let mut cursor = Cursor { bytes, position: 0 };
    if cursor.take(4, "the magic").map_err(|_| GgufError::NotGguf)? != b"GGUF" {
        return Err(GgufError::NotGguf);
    }
    let version = cursor.u32("the version")?;
    if !matches!(version, 2 | 3) {
        return Err(GgufError::Version { version });
    }
    let num_tensors = cursor.u64("the tensor count")?;
    let num_keys = cursor.u64("the key count")?;
    for (what, found, limit) in [("tensors", num_tensors, MAX_TENSORS), ("metadata keys", num_keys, MAX_KEYS)] {
        if found > limit {
            return Err(GgufError::TooMany { what, found, limit });
        }
    }
    let metadata = read_metadata(&mut cursor, num_keys)?;
    let rows = (0..num_tensors).map(|_| read_table_row(&mut cursor)).collect::<Result<Vec<_>, _>>()?;
    let tensors = place(rows, bytes.len(), cursor.position, alignment(&metadata)?)?;
    Ok(Gguf { version, metadata, tensors })
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, when they are strings.
    pub fn strings(&self) -> Option<impl Iterator<Item = Result<&'a str, GgufError>> + use<'a>> {
        let mut cursor = Cursor { bytes: self.bytes, position: 0 };
        (self.element == Scalar::Str).then(|| (0..self.len).map(move |_| cursor.string("an array element")))
    }

    /// The elements, when they are 32-bit floats.
    pub fn floats(&self) -> Option<impl Iterator<Item = f32> + use<'a>> {
        let (elements, _) = self.bytes.as_chunks();
        (self.element == Scalar::F32).then(|| elements.iter().map(|bytes| f32::from_le_bytes(*bytes)))
    }

    /// The elements, when they are 32-bit integers; unsigned ones beyond `i32` wrap.
    pub fn integers(&self) -> Option<impl Iterator<Item = i32> + use<'a>> {
        let (elements, _) = self.bytes.as_chunks();
        matches!(self.element, Scalar::I32 | Scalar::U32)
            .then(|| elements.iter().map(|bytes| i32::from_le_bytes(*bytes)))
    }

    /// The name of the element type, for messages.
    pub fn element_name(&self) -> &'static str {
        match self.element {
            Scalar::Str => "an array of strings",
            Scalar::F32 | Scalar::F64 => "an array of floats",
            Scalar::Bool => "an array of booleans",
            _ => "an array of integers",
        }
    }
}

impl TensorInfo<'_> {
    /// The shape, outermost dimension first.
    pub fn shape(&self) -> Vec<u64> {
        self.dimensions.iter().take(self.num_dimensions).rev().copied().collect()
    }
}

/// Reads the key-value pairs.
fn read_metadata<'a>(cursor: &mut Cursor<'a>, num_keys: u64) -> Result<BTreeMap<&'a str, Value<'a>>, GgufError> {
    let mut metadata = BTreeMap::new();
    for _ in 0..num_keys {
        let key = cursor.name("a metadata key")?;
        let id = cursor.u32("a value type")?;
        let value = read_value(cursor, key, id)?;
        if metadata.insert(key, value).is_some() {
            return Err(GgufError::DuplicateKey { key: key.into() });
        }
    }
    Ok(metadata)
}

/// Reads a value of type `id`.
fn read_value<'a>(cursor: &mut Cursor<'a>, key: &str, id: u32) -> Result<Value<'a>, GgufError> {
    const ARRAY: u32 = 9;
    if id == ARRAY {
        return read_array(cursor, key);
    }
    let scalar = Scalar::from_id(id).ok_or_else(|| GgufError::ValueType { key: key.into(), id, inside: "" })?;
    const WHAT: &str = "a metadata value";
    Ok(match scalar {
        Scalar::U8 => Value::Unsigned(u64::from(u8::from_le_bytes(cursor.array(WHAT)?))),
        Scalar::U16 => Value::Unsigned(u64::from(u16::from_le_bytes(cursor.array(WHAT)?))),
        Scalar::U32 => Value::Unsigned(u64::from(cursor.u32(WHAT)?)),
        Scalar::U64 => Value::Unsigned(cursor.u64(WHAT)?),
        Scalar::I8 => Value::Signed(i64::from(i8::from_le_bytes(cursor.array(WHAT)?))),
        Scalar::I16 => Value::Signed(i64::from(i16::from_le_bytes(cursor.array(WHAT)?))),
        Scalar::I32 => Value::Signed(i64::from(i32::from_le_bytes(cursor.array(WHAT)?))),
        Scalar::I64 => Value::Signed(i64::from_le_bytes(cursor.array(WHAT)?)),
        Scalar::F32 => Value::Float(f64::from(f32::from_le_bytes(cursor.array(WHAT)?))),
        Scalar::F64 => Value::Float(f64::from_le_bytes(cursor.array(WHAT)?)),
        Scalar::Str => Value::Str(cursor.string(WHAT)?),
        Scalar::Bool => match cursor.array(WHAT)? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [found] => return Err(GgufError::Bool { key: key.into(), found }),
        },
    })
}

/// Reads an array: walks over strings, steps over everything else.
fn read_array<'a>(cursor: &mut Cursor<'a>, key: &str) -> Result<Value<'a>, GgufError> {
    const WHAT: &str = "a metadata array";
    let id = cursor.u32(WHAT)?;
    let element =
        Scalar::from_id(id).ok_or_else(|| GgufError::ValueType { key: key.into(), id, inside: " inside an array" })?;
    let start = cursor.position;
    let truncated = || GgufError::Truncated { what: WHAT, offset: start };
    let len = usize::try_from(cursor.u64(WHAT)?).map_err(|_| truncated())?;
    let first = cursor.position;
    if element == Scalar::Str {
        for _ in 0..len {
            let bytes = cursor.u64(WHAT)?;
            cursor.take(usize::try_from(bytes).map_err(|_| truncated())?, WHAT)?;
        }
    } else {
        cursor.take(len.checked_mul(element.bytes()).ok_or_else(truncated)?, WHAT)?;
    }
    Ok(Value::Array(Array { element, len, bytes: &cursor.bytes[first..cursor.position] }))
}

/// A row of the tensor table as it stands in the file.
struct TableRow<'a> {
    name: &'a str,
    dimensions: [u64; MAX_DIMENSIONS as usize],
    num_dimensions: usize,
    kind_id: u32,
    offset: u64,
}

fn read_table_row<'a>(cursor: &mut Cursor<'a>) -> Result<TableRow<'a>, GgufError> {
    const WHAT: &str = "the tensor table";
    let name = cursor.name("a tensor name")?;
    let found = cursor.u32(WHAT)?;
    if found > MAX_DIMENSIONS {
        return Err(GgufError::Dimensions { tensor: name.into(), found });
    }
    let num_dimensions = found as usize;
    let mut dimensions = [1; MAX_DIMENSIONS as usize];
    for dimension in dimensions.iter_mut().take(num_dimensions) {
        *dimension = cursor.u64(WHAT)?;
    }
    Ok(TableRow { name, dimensions, num_dimensions, kind_id: cursor.u32(WHAT)?, offset: cursor.u64(WHAT)? })
}

/// `general.alignment`, 32 when absent.
fn alignment(metadata: &BTreeMap<&str, Value<'_>>) -> Result<u64, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::Unsigned(found)) if found.is_power_of_two() && ALIGNMENTS.contains(found) => Ok(*found),
        Some(other) => Err(GgufError::Alignment { found: format!("{other:?}") }),
    }
}

/// Turns offsets into checked, disjoint ranges of the file. The data starts at the first multiple of `alignment` after
/// the table.
fn place(
    rows: Vec<TableRow<'_>>,
    file_len: usize,
    table_end: usize,
    alignment: u64,
) -> Result<Vec<TensorInfo<'_>>, GgufError> {
    let file_len = file_len as u64;
    let data_start = (table_end as u64).checked_next_multiple_of(alignment).unwrap_or(u64::MAX).min(file_len);
    let available = file_len.saturating_sub(data_start);

    let mut offsets: Vec<u64> = rows.iter().map(|row| row.offset).collect();
    offsets.sort_unstable();
    let mut tensors = Vec::with_capacity(rows.len());
    for row in rows {
        if !row.offset.is_multiple_of(alignment) {
            return Err(GgufError::Misaligned { tensor: row.name.into(), offset: row.offset, alignment });
        }
        let after = offsets.partition_point(|&offset| offset <= row.offset);
        let next = offsets.get(after).copied().unwrap_or(available).min(available);
        let room = next.saturating_sub(row.offset);
        let (kind, bytes) = kind_and_bytes(&row, room)?;
        let start = data_start.checked_add(row.offset);
        let end = start.and_then(|start| start.checked_add(bytes)).filter(|&end| end <= file_len);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(GgufError::OutOfFile { tensor: row.name.into(), offset: row.offset, bytes, available });
        };
        let TableRow { name, dimensions, num_dimensions, .. } = row;
        // Both are at most the length of a slice, so they fit a usize.
        tensors.push(TensorInfo { name, dimensions, num_dimensions, kind, range: start as usize..end as usize });
    }
    refuse_duplicates(&tensors)?;
    refuse_overlaps(&tensors)?;
    Ok(tensors)
}

/// The type of a tensor and the bytes its shape takes; `room` is what lies between its offset and the next tensor's.
fn kind_and_bytes(row: &TableRow<'_>, room: u64) -> Result<(&'static TensorKind, u64), GgufError> {
    let kinds = || KINDS.iter().filter(|kind| kind.id == row.kind_id);
    let unknown = || GgufError::TensorType { tensor: row.name.into(), id: row.kind_id };
    let first = kinds().next().ok_or_else(unknown)?;
    // Two programs use number 39; the bytes tell whose file it is. Padding to the alignment is below any real tensor.
    let fits = |kind: &&TensorKind| {
        kind.size == Size::ToNext || kind.bytes(&row.dimensions).is_some_and(|bytes| bytes <= room)
    };
    let kind = kinds().find(fits).unwrap_or(first);
    let shape_error = || GgufError::Shape {
        tensor: row.name.into(),
        kind: kind.name,
        dimensions: row.dimensions.iter().take(row.num_dimensions).copied().collect(),
    };
    if row.dimensions.contains(&0) {
        return Err(shape_error());
    }
    let bytes = match kind.size {
        Size::ToNext => room,
        _ => kind.bytes(&row.dimensions).ok_or_else(shape_error)?,
    };
    Ok((kind, bytes))
}

fn refuse_duplicates(tensors: &[TensorInfo<'_>]) -> Result<(), GgufError> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name).collect();
    names.sort_unstable();
    match names.array_windows().find(|[first, second]| first == second) {
        Some([name, _]) => Err(GgufError::DuplicateTensor { tensor: (*name).into() }),
        None => Ok(()),
    }
}

fn refuse_overlaps(tensors: &[TensorInfo<'_>]) -> Result<(), GgufError> {
    let mut by_start: Vec<&TensorInfo<'_>> = tensors.iter().collect();
    by_start.sort_unstable_by_key(|tensor| tensor.range.start);
    match by_start.array_windows().find(|[first, second]| first.range.end > second.range.start) {
        Some([first, second]) => Err(GgufError::Overlap { first: first.name.into(), second: second.name.into() }),
        None => Ok(()),
    }
}

impl Scalar {
    fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::Str,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of one element; strings have no fixed size.
    fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool | Self::Str => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }
}

/// Reads forward through bytes, refusing to go beyond them.
struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], GgufError> {
        let offset = self.position;
        let end = offset.checked_add(count);
        let taken = end.and_then(|end| self.bytes.get(offset..end)).ok_or(GgufError::Truncated { what, offset })?;
        self.position = offset.saturating_add(count);
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let offset = self.position;
        let truncated = |_| GgufError::Truncated { what, offset };
        self.take(N, what)?.try_into().map_err(truncated)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &'static str) -> Result<&'a str, GgufError> {
        let offset = self.position;
        let count = usize::try_from(self.u64(what)?).map_err(|_| GgufError::Truncated { what, offset })?;
        std::str::from_utf8(self.take(count, what)?).map_err(|_| GgufError::Utf8 { what, offset })
    }

    /// A string that is a key or a name: short.
    fn name(&mut self, what: &'static str) -> Result<&'a str, GgufError> {
        let name = self.string(what)?;
        if name.len() > MAX_NAME_BYTES {
            return Err(GgufError::TooMany {
                what: "bytes of a name",
                found: name.len() as u64,
                limit: MAX_NAME_BYTES as u64,
            });
        }
        Ok(name)
    }
}
