//! Objects that are read from objects alone. What serde derives for a struct also takes an array of its fields in their order,
//! which no client means: a list in the place of an object is a mistake, to be told.

use serde::{Deserializer, de::Visitor, forward_to_deserialize_any};

/// A value that has to be an object.
pub(super) struct AsObject<D>(pub(super) D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for AsObject<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// `Deserialize` for structs that derive it with `remote = "Self"`.
macro_rules! objects_only {
    ($($name:ident),+) => {$(
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $name::deserialize($crate::openai::objects::AsObject(deserializer))
            }
        }
    )+};
}

pub(super) use objects_only;
