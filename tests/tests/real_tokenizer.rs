//! The vectors of the real 128,256-token tokenizer, which is not shipped: `BITNET_TEST_TOKENIZER_DIR` names a directory with
//! `tokenizer.json`, `chat_vectors.json` and `decode_vectors.json`, beside which `../vectors` holds the others. Without it
//! the run says in one line that they were no part of it.

mod tokenizer_support;

use std::path::{Path, PathBuf};

use bitnet_core::{Tokenizer, tokenizer::EncodeOptions};
use tokenizer_support::{Vector, both_sources, check_vectors, raw, read_json, typed};

const BOS: u32 = 128_000;

#[derive(serde::Deserialize)]
struct DecodeVector {
    ids: Vec<u32>,
    text: String,
    text_skip_special: String,
}

#[test]
fn real_tokenizer_vectors() {
    let Some(directory) = std::env::var_os("BITNET_TEST_TOKENIZER_DIR").map(PathBuf::from) else {
        println!(
            "real_tokenizer: the 128k tokenizer's vectors were not part of this run (BITNET_TEST_TOKENIZER_DIR is not set)"
        );
        return;
    };
    for (source, tokenizer) in both_sources(&directory.join("tokenizer.json"), BOS) {
        assert_eq!(tokenizer.vocab_size(), 128_256, "{source}");
        let mut counts = Vec::new();
        for file in ["llama-bpe.bitnetfork.json", "llama-bpe.mainline2026.json", "llama3.random300.json"] {
            let vectors: Vec<Vector> = read_json(&directory.join("../vectors").join(file));
            check_vectors(&format!("{source}, {file}"), &tokenizer, &vectors);
            counts.push(vectors.len());
        }
        counts.push(check_chats(source, &tokenizer, &directory));
        counts.push(check_decoding(source, &tokenizer, &directory));
        assert_eq!(counts, [46, 46, 300, 22, 140], "{source}");
        println!("real_tokenizer: from {source}: {counts:?} vectors agree");
    }
}

fn check_chats(source: &str, tokenizer: &Tokenizer, directory: &Path) -> usize {
    let vectors: Vec<Vector> = read_json(&directory.join("chat_vectors.json"));
    let options = EncodeOptions { add_special_tokens: true, parse_special: true };
    for Vector { text, ids } in &vectors {
        assert_eq!(&raw(&tokenizer.encode(text, options).expect("encodes")), ids, "{source}: {text:?}");
    }
    vectors.len()
}

fn check_decoding(source: &str, tokenizer: &Tokenizer, directory: &Path) -> usize {
    let vectors: Vec<DecodeVector> = read_json(&directory.join("decode_vectors.json"));
    for DecodeVector { ids, text, text_skip_special } in &vectors {
        assert_eq!(&tokenizer.decode(&typed(ids), false), text, "{source}: {ids:?}");
        assert_eq!(&tokenizer.decode(&typed(ids), true), text_skip_special, "{source}: {ids:?}, special skipped");
    }
    vectors.len()
}
