//! The vectors of the real 128,256-token tokenizer, which is not shipped: `BITNET_TEST_TOKENIZER_DIR` names a directory with
//! `tokenizer.json`, `chat_vectors.json` and `decode_vectors.json`, beside which `../vectors` holds the others. Without it
//! the run says in one line that they were no part of it.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use bitnet_core::{TokenId, Tokenizer};
use bitnet_server::prompt::{ChatMessage, ChatOptions, ChatPrompter};
use bitnet_tests::tokenizer_support::{Vector, both_sources, check_vectors, raw, read_json, typed};

const BOS: u32 = 128_000;
const END_OF_TEXT: u32 = 128_001;
const EOT: u32 = 128_009;

#[derive(serde::Deserialize)]
struct ChatVector {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: String,
    ids: Vec<u32>,
    gguf_template_text: String,
}

#[derive(serde::Deserialize)]
struct Message {
    role: String,
    content: String,
}

#[derive(serde::Deserialize)]
struct DecodeVector {
    ids: Vec<u32>,
    text: String,
    text_skip_special: String,
}

#[test]
fn real_tokenizer_vectors() {
    let Some(directory) = std::env::var_os("BITNET_TEST_TOKENIZER_DIR").map(PathBuf::from) else {
        say("the 128k tokenizer's vectors were not part of this run (BITNET_TEST_TOKENIZER_DIR is not set)");
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
        counts.push(check_decoding(source, &tokenizer, &directory));
        counts.push(check_chats(source, &Arc::new(tokenizer), &directory));
        assert_eq!(counts, [46, 46, 300, 140, 22], "{source}");
        say(&format!("from {source}: {counts:?} vectors agree"));
    }
}

/// Rendered text and ids of every conversation, with the model's own template and with the one in the published GGUF.
fn check_chats(source: &str, tokenizer: &Arc<Tokenizer>, directory: &Path) -> usize {
    let prompter = |template: &str, eos: u32| {
        let template = std::fs::read_to_string(directory.join(template)).expect("the template can be read");
        ChatPrompter::new(tokenizer.clone(), Some(&template), Some(TokenId(BOS)), Some(TokenId(eos))).expect("compiles")
    };
    let model = prompter("chat_template.hf.jinja", EOT);
    let gguf = prompter("chat_template.gguf.jinja", END_OF_TEXT);
    let vectors: Vec<ChatVector> = read_json(&directory.join("chat_vectors.json"));
    for ChatVector { messages, add_generation_prompt, text, ids, gguf_template_text } in &vectors {
        let messages: Vec<ChatMessage> = messages.iter().map(chat_message).collect();
        let options = ChatOptions { add_generation_prompt: *add_generation_prompt, ..ChatOptions::default() };
        assert_eq!(&model.render_chat(&messages, &options).expect("renders"), text, "{source}");
        assert_eq!(&gguf.render_chat(&messages, &options).expect("renders"), gguf_template_text, "{source}");
        assert_eq!(&raw(&model.encode_text(text, true).expect("encodes")), ids, "{source}: {text:?}");
        let chat_ids = raw(&model.encode_chat(&messages, &options).expect("encodes"));
        if text.contains("injection") {
            // Differs on purpose: the user's special tokens are text, the one that ends the turn is not.
            assert_eq!(chat_ids.iter().filter(|&&id| id == EOT).count(), 1, "{source}: {chat_ids:?}");
            assert_eq!(&tokenizer.decode(&typed(&chat_ids[1..]), false), text, "{source}");
        } else {
            assert_eq!(&chat_ids, ids, "{source}: {text:?}");
        }
    }
    vectors.len()
}

fn chat_message(Message { role, content }: &Message) -> ChatMessage {
    ChatMessage { role: role.clone(), content: content.clone(), ..ChatMessage::default() }
}

fn check_decoding(source: &str, tokenizer: &Tokenizer, directory: &Path) -> usize {
    let vectors: Vec<DecodeVector> = read_json(&directory.join("decode_vectors.json"));
    for DecodeVector { ids, text, text_skip_special } in &vectors {
        assert_eq!(&tokenizer.decode(&typed(ids), false), text, "{source}: {ids:?}");
        assert_eq!(&tokenizer.decode(&typed(ids), true), text_skip_special, "{source}: {ids:?}, special skipped");
    }
    vectors.len()
}

/// A line that the test harness does not hold back.
fn say(line: &str) {
    writeln!(std::io::stderr(), "real_tokenizer: {line}").expect("stderr is open");
}
