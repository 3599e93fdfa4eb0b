//! A client that notes when each token came and how its request ended.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};

use super::figures::{Sorted, mixed};
use crate::server::Server;

/// Longest wait for the end of a request; a request that takes longer counts as hanging.
const HANGS_AFTER: Duration = Duration::from_secs(300);

/// One streamed request as its client saw it.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// When it was sent.
    pub sent: Instant,
    /// When each chunk with tokens came.
    pub tokens: Vec<Instant>,
    /// When it ended.
    pub ended: Instant,
    /// How it ended.
    pub outcome: Outcome,
    /// Prompt tokens that came from the prefix cache, as its usage says.
    pub cached_tokens: u64,
    /// Generated tokens, as its usage says.
    pub completion_tokens: u64,
    /// Those of them that its prediction foresaw, as its usage says.
    pub accepted_tokens: u64,
}

/// The end of a request. There is always exactly one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `[DONE]`.
    Done,
    /// Another status than 200.
    Refused {
        /// The status.
        status: u16,
        /// Whether `Retry-After` was there.
        retry_after: bool,
    },
    /// The stream ended with an error object.
    Error(String),
    /// The connection broke, or nothing ended the stream.
    Broken(String),
}

impl Exchange {
    /// Seconds to the first token.
    pub fn ttft(&self) -> Option<f64> {
        self.tokens.first().map(|first| (*first - self.sent).as_secs_f64())
    }

    /// Seconds between tokens.
    pub fn gaps(&self) -> impl Iterator<Item = f64> + '_ {
        self.tokens.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64())
    }

    /// Tokens per second after the first one.
    pub fn tokens_per_s(&self) -> Option<f64> {
        let seconds = (*self.tokens.last()? - *self.tokens.first()?).as_secs_f64();
        (seconds > 0.0).then(|| (self.completion_tokens - 1) as f64 / seconds)
    }

    /// Seconds from the first byte sent to the last one received.
    pub fn seconds(&self) -> f64 {
        (self.ended - self.sent).as_secs_f64()
    }

    /// Whether it ended with `[DONE]`.
    pub fn is_done(&self) -> bool {
        self.outcome == Outcome::Done
    }
}

/// All times to the first token.
pub fn ttfts(exchanges: &[Exchange]) -> Sorted {
    exchanges.iter().filter_map(Exchange::ttft).collect()
}

/// All times between tokens.
pub fn gaps(exchanges: &[Exchange]) -> Sorted {
    exchanges.iter().flat_map(Exchange::gaps).collect()
}

/// A completion of exactly `num_tokens` tokens, greedy, streamed, with its usage.
pub fn completion(prompt: &[u32], num_tokens: u64) -> Value {
    json!({
        "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": true, "temperature": 0,
        "return_token_ids": true, "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false},
    })
}

/// `len` token ids that no other `index` begins with. The first ids of a vocabulary are bytes or common tokens, none special.
pub fn prompt(index: u64, len: usize) -> Vec<u32> {
    let id = |i: u64| (3 + mixed(index.wrapping_mul(1 << 20).wrapping_add(i)) % 200) as u32;
    (0..len as u64).map(id).collect()
}

/// Sends `body` to `/v1/completions` and reads the stream to its end.
pub async fn stream(server: &Server, body: &Value) -> Exchange {
    exchange(server.client().post(server.url("/v1/completions")), body).await
}

/// The same as the client with this API key.
pub async fn stream_as(server: &Server, key: &str, body: &Value) -> Exchange {
    exchange(server.client().post(server.url("/v1/completions")).bearer_auth(key), body).await
}

/// A client that keeps no connection between requests.
///
/// # Panics
/// When the system has no randomness for it.
pub fn unpooled() -> Client {
    Client::builder().pool_max_idle_per_host(0).build().expect("a client")
}

async fn exchange(request: RequestBuilder, body: &Value) -> Exchange {
    let sent = Instant::now();
    let mut exchange = Exchange {
        sent,
        tokens: Vec::new(),
        ended: sent,
        outcome: Outcome::Broken("hangs".into()),
        cached_tokens: 0,
        completion_tokens: 0,
        accepted_tokens: 0,
    };
    if let Ok(outcome) = tokio::time::timeout(HANGS_AFTER, read(request.json(body), &mut exchange)).await {
        exchange.outcome = outcome;
    }
    exchange.ended = Instant::now();
    exchange
}

async fn read(request: RequestBuilder, exchange: &mut Exchange) -> Outcome {
    let response = match request.send().await {
        Ok(response) => response,
        Err(error) => return Outcome::Broken(error.to_string()),
    };
    if response.status() != 200 {
        let (status, retry_after) = (response.status().as_u16(), response.headers().contains_key("retry-after"));
        // The connection can be used again only when its answer has been read.
        let _ = response.bytes().await;
        return Outcome::Refused { status, retry_after };
    }
    let mut bytes = response.bytes_stream();
    let mut buffer = Vec::new();
    while let Some(part) = bytes.next().await {
        match part {
            Ok(part) => buffer.extend_from_slice(&part),
            Err(error) => return Outcome::Broken(error.to_string()),
        }
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            if let Some(outcome) = line.strip_prefix(b"data: ").and_then(|data| note(data.trim_ascii(), exchange)) {
                return outcome;
            }
        }
    }
    Outcome::Broken("the stream has no end".into())
}

/// Notes one event; `Some` at the end of the stream.
fn note(data: &[u8], exchange: &mut Exchange) -> Option<Outcome> {
    if data == b"[DONE]" {
        return Some(Outcome::Done);
    }
    let Ok(chunk) = serde_json::from_slice::<Value>(data) else {
        return Some(Outcome::Broken(format!("no JSON: {}", String::from_utf8_lossy(data))));
    };
    if let Some(error) = chunk.get("error") {
        return Some(Outcome::Error(error.to_string()));
    }
    if let Some(usage) = chunk.get("usage").filter(|usage| usage.is_object()) {
        exchange.completion_tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
        let details = &usage["completion_tokens_details"];
        exchange.accepted_tokens = details["accepted_prediction_tokens"].as_u64().unwrap_or(0);
        exchange.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    }
    let has_tokens = |choice: &Value| choice["token_ids"].as_array().is_some_and(|tokens| !tokens.is_empty());
    if chunk["choices"].as_array().is_some_and(|choices| choices.iter().any(has_tokens)) {
        exchange.tokens.push(Instant::now());
    }
    None
}
