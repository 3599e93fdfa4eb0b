//! An answer is the same to the bit alone and in a crowd: mixed requests, shared prefixes, speculation, random cancellations.

use std::time::Duration;

use bitnet_tests::{golden, server::Server};
use futures_util::future::{join, join_all};
use serde_json::{Value, json};

const NUM_REQUESTS: u64 = 120;
const NUM_CANCELLED: u64 = 60;
const PREFIX: &str = "Many of the requests begin with these words, which the prefix cache keeps for all of them. ";

#[tokio::test]
async fn mixed_requests_do_not_change_each_other() {
    let model = golden::arg("p1_packed");
    let start = |speculation| {
        let settings = ["--response-cache-mb", "0", "--max-queue", "1000", "--speculation", speculation];
        Server::start(&[&["-m", &model], settings.as_slice()].concat())
    };
    let (plain, server) = (start("off"), start("auto"));
    let mut alone = Vec::new();
    for i in 0..NUM_REQUESTS {
        alone.push(choices(&plain, &request(i)).await);
    }
    assert_eq!(plain.metric("bitnet_speculation_drafted_tokens_total").await, 0.0);
    // 7 is prime to the number of requests: every one once, in another order.
    let order = (0..NUM_REQUESTS).map(|i| i * 7 % NUM_REQUESTS);
    let crowd = join_all(order.map(|i| {
        let (server, mut body) = (&server, request(i));
        if i % 3 == 0 {
            let said = alone[usize::try_from(i).expect("small")][0]["text"].clone();
            body["prediction"] = json!({"type": "content", "content": said});
        }
        async move { (i, choices(server, &body).await) }
    }));
    let cancelled = join_all((0..NUM_CANCELLED).map(|i| {
        let body =
            json!({"prompt": PREFIX, "max_tokens": 3000, "ignore_eos": true, "stream": i % 2 == 0, "n": 1 + i % 2});
        let answer = server.client().post(server.url("/v1/completions")).json(&body).send();
        tokio::time::timeout(Duration::from_millis(5 * (i * 13 % 60)), answer)
    }));
    let (crowd, _) = join(crowd, cancelled).await;
    for (i, choices) in crowd {
        assert_eq!(choices, alone[usize::try_from(i).expect("small")], "request {i}");
    }
    assert!(server.metric("bitnet_prefix_cache_hit_tokens_total").await > 0.0);
    assert!(server.metric("bitnet_speculation_drafted_tokens_total").await > 0.0);
}

async fn choices(server: &Server, body: &Value) -> Value {
    server.post("/v1/completions", body).await.ok()["choices"].clone()
}

/// Greedy and seeded requests of every kind, `i` deciding which.
fn request(i: u64) -> Value {
    let prefix = if i.is_multiple_of(2) { PREFIX } else { "" };
    let mut body = json!({
        "prompt": format!("{prefix}Text number {} goes on", i % 17),
        "max_tokens": 1 + i * 11 % 60,
        "temperature": match i % 3 { 0 => 0.0, 1 => 0.7, _ => 1.3 },
        "seed": i % 5,
        "return_token_ids": true,
    });
    let kinds = [
        ("logprobs", json!(3)),
        ("top_p", json!(0.9)),
        ("top_k", json!(20)),
        ("n", json!(3)),
        ("presence_penalty", json!(0.5)),
        ("guided_regex", json!("(Quality|Quantity) of [a-z ]{5,20}: \\{\"amount_of_mercy\": [0-9]+\\}")),
    ];
    for (bit, (name, value)) in kinds.into_iter().enumerate() {
        if ((i * 0x9e37) >> bit) & 3 == 0 {
            body[name] = value;
        }
    }
    body
}
