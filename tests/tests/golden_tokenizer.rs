//! The 38 tokenizer vectors of each golden checkpoint, from `tokenizer.json`, from a GGUF vocabulary made of it and
//! from the GGUF files.

use std::path::{Path, PathBuf};

use bitnet_core::{LoadOptions, TokenId, Tokenizer, tokenizer::EncodeOptions, tokenizer::IncrementalDecoder};
use bitnet_tests::tokenizer_support::{Vector, both_sources, check_vectors, raw, read_json};
use proptest::prelude::*;

const MODELS: [&str; 4] = ["p1_packed", "p2_master", "p3_llama", "p4_silu"];
const BOS: u32 = 500;
const EOT: u32 = 509;

#[derive(serde::Deserialize)]
struct Golden {
    tokenizer_vectors: Vec<Vector>,
    prompts: Vec<Prompt>,
}

#[derive(serde::Deserialize)]
struct Prompt {
    text: String,
    ids: Vec<u32>,
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/public")
}

fn tokenizers() -> [(&'static str, Tokenizer); 2] {
    both_sources(&golden().join("p1_packed/tokenizer.json"), BOS)
}

/// The tokenizer that the checkpoint loader finds in a GGUF file.
fn from_file(model: &str, kind: &'static str) -> (&'static str, Tokenizer) {
    let path = golden().join(format!("{model}.{kind}.gguf"));
    let checkpoint = bitnet_core::checkpoint::open(&path, &LoadOptions::default()).expect("the file opens");
    (kind, Tokenizer::from_source(&checkpoint.tokenizer.expect("it has a tokenizer")).expect("which is sound"))
}

#[test]
fn vectors_agree_from_both_sources() {
    for model in MODELS {
        let golden_file: Golden = read_json(&golden().join(format!("{model}.golden.json")));
        assert_eq!(golden_file.tokenizer_vectors.len(), 38);
        let sources = both_sources(&golden().join(model).join("tokenizer.json"), BOS).into_iter();
        for (source, tokenizer) in sources.chain(["f16", "i2_s", "tq1_0", "tq2_0"].map(|kind| from_file(model, kind))) {
            let name = format!("{model} from {source}");
            assert_eq!(tokenizer.bos(), Some(TokenId(BOS)), "{name}");
            assert_eq!(tokenizer.vocab_size(), 512, "{name}");
            check_vectors(&name, &tokenizer, &golden_file.tokenizer_vectors);
            for Prompt { text, ids } in &golden_file.prompts {
                let options = EncodeOptions { add_special_tokens: true, parse_special: true };
                assert_eq!(&raw(&tokenizer.encode(text, options).expect("encodes")), ids, "{name}: {text:?}");
            }
        }
    }
}

#[test]
fn special_tokens_are_read_or_stay_text_as_asked() {
    for (name, tokenizer) in tokenizers() {
        let encode = |text: &str, parse_special: bool| {
            raw(&tokenizer.encode(text, EncodeOptions { add_special_tokens: false, parse_special }).expect("encodes"))
        };
        assert_eq!(encode("<|eot_id|>", true), [EOT], "{name}");
        let plain = encode("a<|eot_id|>b", false);
        assert!(plain.iter().all(|&id| id < BOS), "{name}: {plain:?}");
        assert_eq!(
            plain,
            [
                encode("a", true),
                encode("<|", true),
                encode("eot", true),
                encode("_", true),
                encode("id", true),
                encode("|>", true),
                encode("b", true)
            ]
            .concat(),
            "{name}"
        );
        assert!(tokenizer.is_special(TokenId(EOT)), "{name}");
        assert!(!tokenizer.is_special(TokenId(0)) && !tokenizer.is_special(TokenId(9999)), "{name}");
        assert_eq!(tokenizer.token_bytes(TokenId(EOT)), b"<|eot_id|>", "{name}");
        assert_eq!(tokenizer.token_bytes(TokenId(220)), b" ", "{name}");
        assert_eq!(tokenizer.token_bytes(TokenId(9999)), b"", "{name}");
        assert_eq!(tokenizer.token_id("<|eot_id|>"), Some(TokenId(EOT)), "{name}");
        assert_eq!(tokenizer.decode(&[TokenId(EOT), TokenId(64), TokenId(9999)], true), "a", "{name}");
    }
}

#[test]
fn a_stand_in_keeps_one_special_text_plain_and_changes_nothing_else() {
    for (name, tokenizer) in tokenizers() {
        let options = |parse_special| EncodeOptions { add_special_tokens: true, parse_special };
        let disguised = "User: hi there \u{F0000}|eot_id|> 3 < 4<|eot_id|>";
        let got = tokenizer.encode_with_stand_ins(disguised, &[('\u{F0000}', '<')], true, usize::MAX).expect("encodes");
        let mut expected = tokenizer.encode("User: hi there <|eot_id|> 3 < 4", options(false)).expect("encodes");
        expected.push(TokenId(EOT));
        assert_eq!(got, expected, "{name}");
        let text = "plain text, é and\n\n spaces   <|eot_id|>Assistant: ";
        let plain = tokenizer.encode_with_stand_ins(text, &[], true, usize::MAX).expect("encodes");
        assert_eq!(plain, tokenizer.encode(text, options(true)).expect("encodes"), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_survives_the_round_trip(text in prop_oneof![any::<String>(), "[ a-zé'\n\t0-9<|>_]{0,64}"]) {
        for (_, tokenizer) in shared() {
            for parse_special in [false, true] {
                let ids = tokenizer.encode(&text, EncodeOptions { add_special_tokens: false, parse_special }).expect("encodes");
                prop_assert_eq!(&tokenizer.decode(&ids, false), &text);
            }
        }
    }

    #[test]
    fn both_sources_agree_on_any_text(text in any::<String>()) {
        let options = EncodeOptions { add_special_tokens: true, parse_special: true };
        let [(_, json), (_, gguf)] = shared();
        prop_assert_eq!(json.encode(&text, options).expect("encodes"), gguf.encode(&text, options).expect("encodes"));
    }

    #[test]
    fn increments_add_up_to_the_whole(ids in proptest::collection::vec(0u32..520, 0..64), skip_special: bool) {
        for (_, tokenizer) in shared() {
            let ids: Vec<TokenId> = ids.iter().copied().map(TokenId).collect();
            let kept = ids.iter().filter(|id| !(skip_special && tokenizer.is_special(**id)));
            let bytes: Vec<u8> = kept.flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
            let mut decoder = IncrementalDecoder::new(skip_special);
            let mut text: String = ids.iter().map(|&id| decoder.push(tokenizer, id)).collect();
            text += &decoder.finish();
            prop_assert_eq!(&text, &String::from_utf8_lossy(&bytes));
            prop_assert_eq!(text, tokenizer.decode(&ids, skip_special));
        }
    }
}

/// Built once: the properties run it hundreds of times.
fn shared() -> &'static [(&'static str, Tokenizer); 2] {
    static SHARED: std::sync::OnceLock<[(&'static str, Tokenizer); 2]> = std::sync::OnceLock::new();
    SHARED.get_or_init(tokenizers)
}
