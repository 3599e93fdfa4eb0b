//! GGUF bytes -> checkpoint -> every weight decoded. Errors are fine, panics are not.
#![no_main]

use bitnet_core::checkpoint::{self, I2sLayout, LoadOptions};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for i2s_layout in [I2sLayout::A, I2sLayout::B, I2sLayout::C] {
        let Ok(model) = checkpoint::open_bytes("fuzz", data.to_vec().into(), &LoadOptions { i2s_layout }) else { return };
        let embedding = &model.weights.token_embedding;
        let mut values = vec![0.0; embedding.cols];
        (0..embedding.rows).for_each(|row| embedding.decode_row(row, &mut values));
        for layer in &model.weights.layers {
            for tensor in [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down] {
                let Ok(reader) = tensor.reader() else { continue };
                let mut codes = vec![0; tensor.cols];
                for row in 0..tensor.rows {
                    if reader.decode_row(row, &mut codes).is_ok() {
                        assert!(codes.iter().all(|code| matches!(code, -1..=1)));
                    }
                }
            }
        }
    }
});
