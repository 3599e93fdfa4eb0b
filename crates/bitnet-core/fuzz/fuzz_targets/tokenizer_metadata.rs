//! The vocabulary of a GGUF file -> tokenizer -> a text there and back, and every id decoded.
#![no_main]

use bitnet_core::{
    TokenId, Tokenizer,
    checkpoint::{self, TokenizerSource, gguf},
    tokenizer::EncodeOptions,
};
use libfuzzer_sys::fuzz_target;

const TEXT: &str = "Hello, w\u{f6}rld! 1234567 \u{1f642} <|eot_id|>\n\n  x";

fuzz_target!(|data: &[u8]| {
    let Ok(file) = gguf::parse(data) else { return };
    let Ok(Some(vocabulary)) = checkpoint::gguf_vocabulary(&file, 65_536) else { return };
    let num_tokens = vocabulary.tokens.len() as u32;
    let Ok(tokenizer) = Tokenizer::from_source(&TokenizerSource::Gguf(vocabulary)) else { return };
    for parse_special in [false, true] {
        if let Ok(ids) = tokenizer.encode(TEXT, EncodeOptions { add_special_tokens: true, parse_special }) {
            tokenizer.decode(&ids, false);
        }
    }
    let ids: Vec<TokenId> = (0..num_tokens.saturating_add(2)).map(TokenId).collect();
    tokenizer.decode(&ids, true);
});
