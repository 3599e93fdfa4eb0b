//! Safetensors bytes -> tensor table, whose ranges must lie inside the bytes, apart from each other.
#![no_main]

use bitnet_core::checkpoint::safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(header) = safetensors::parse(data) else { return };
    let mut covered = 0;
    for tensor in &header.tensors {
        covered += data[tensor.range.clone()].len();
        let elements: u64 = tensor.shape.iter().product();
        assert_eq!(elements * tensor.dtype.bytes, tensor.range.len() as u64);
    }
    assert!(covered <= data.len());
});
