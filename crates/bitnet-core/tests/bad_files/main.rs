//! Hostile and broken model files: each ends in a typed error that says what is wrong, without a panic, and without
//! holding much more memory than the file is long.
#![allow(clippy::unwrap_used)]

mod gguf;
mod hugging_face;
mod writer;

use bitnet_core::checkpoint::{Checkpoint, LoadError, TernaryTensor};

/// Beyond twice the file: error messages, small buffers, a row of codes.
const SLACK: usize = 64 << 10;

/// Opens a model and decodes every weight of it.
fn load(open: impl FnOnce() -> Result<Checkpoint, LoadError>) -> Result<(), LoadError> {
    let checkpoint = open()?;
    let embedding = &checkpoint.weights.token_embedding;
    let mut values = vec![0.0; embedding.cols];
    for matrix in [Some(embedding), checkpoint.weights.lm_head.as_ref()].into_iter().flatten() {
        (0..matrix.rows).for_each(|row| matrix.decode_row(row, &mut values));
    }
    checkpoint.weights.layers.iter().try_for_each(|layer| {
        let linears = [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down];
        linears.into_iter().try_for_each(decode)
    })
}

fn decode(tensor: &TernaryTensor) -> Result<(), LoadError> {
    let reader = tensor.reader()?;
    let mut codes = vec![0; tensor.cols];
    (0..tensor.rows).try_for_each(|row| reader.decode_row(row, &mut codes))
}

/// Runs `work` and returns the most bytes this thread held meanwhile, beyond what it held before.
fn peak_during<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let mut value = None;
    let held = allocation_counter::measure(|| value = Some(work()));
    (value.expect("it ran"), held.bytes_max as usize)
}

/// Asserts that loading ends in an error whose message contains `expected`, within the allocation limit.
fn assert_refused(name: &str, expected: &str, file_bytes: usize, open: impl FnOnce() -> Result<Checkpoint, LoadError>) {
    let (result, peak) = peak_during(|| load(open));
    let Err(error) = result else { panic!("{name}: was accepted") };
    let message = error.to_string();
    assert!(message.contains(expected), "{name}: `{message}` does not say `{expected}`");
    assert!(peak <= 2 * file_bytes + SLACK, "{name}: held {peak} bytes for a file of {file_bytes}");
}
