//! What guessing gains where the output follows a `prediction` but for one word, and what it costs where nothing foresees it.
//!
//! Random weights repeat no text of their prompt, so a copying model is played by its own output as the prediction: the guesses
//! are as good as a copy's, and each is verified all the same.

use std::fmt;

use serde_json::{Value, json};

use super::{
    client::{Exchange, completion, prompt, stream},
    figures::Sorted,
};
use crate::server::Server;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Prompts; each is asked with and without speculation.
    pub pairs: u64,
    /// Tokens of a prompt.
    pub prompt_len: usize,
    /// Tokens generated.
    pub num_tokens: u64,
}

/// Speed with speculation as a multiple of that without, by what the prediction was.
#[derive(Clone, Debug)]
pub struct Report {
    /// The output with one word changed.
    pub copied: Sorted,
    /// Share of these outputs that the prediction foresaw.
    pub foreseen: Sorted,
    /// The output of another prompt.
    pub wrong: Sorted,
    /// None.
    pub none: Sorted,
}

/// Asks `off`, which never guesses, and `auto` in turn.
///
/// # Panics
/// When a request does not end as it should.
pub async fn run(off: &Server, auto: &Server, plan: Plan) -> Report {
    let ask = |index: u64| completion(&prompt(index, plan.prompt_len), plan.num_tokens);
    let mut texts = Vec::new();
    for index in 0..plan.pairs {
        let mut body = ask(index);
        (body["stream"], body["stream_options"]) = (false.into(), Value::Null);
        let answer = off.post("/v1/completions", &body).await.ok();
        texts.push(answer["choices"][0]["text"].as_str().expect("a text").to_owned());
    }
    let (mut copied, mut foreseen, mut wrong, mut none) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, text) in (0..).zip(&texts) {
        let foreseen_as = |text: &str| {
            let mut body = ask(index);
            body["prediction"] = json!({"type": "content", "content": text});
            body
        };
        let (ratio, exchange) = pair(off, auto, &foreseen_as(&one_word_changed(text)), index).await;
        copied.push(ratio);
        foreseen.push(exchange.accepted_tokens as f64 / plan.num_tokens as f64);
        let another = &texts[(index as usize + 1) % texts.len()];
        wrong.push(pair(off, auto, &foreseen_as(another), index).await.0);
        none.push(pair(off, auto, &ask(index), index).await.0);
    }
    let sorted = |values: Vec<f64>| values.into_iter().collect();
    Report { copied: sorted(copied), foreseen: sorted(foreseen), wrong: sorted(wrong), none: sorted(none) }
}

/// How much faster `auto` answers than `off`, and its answer; `turn` says which is asked first.
async fn pair(off: &Server, auto: &Server, body: &Value, turn: u64) -> (f64, Exchange) {
    let (plain, guessed) = if turn.is_multiple_of(2) {
        (stream(off, body).await, stream(auto, body).await)
    } else {
        let guessed = stream(auto, body).await;
        (stream(off, body).await, guessed)
    };
    let speed = |exchange: &Exchange| exchange.tokens_per_s().unwrap_or_else(|| panic!("{:?}", exchange.outcome));
    (speed(&guessed) / speed(&plain), guessed)
}

/// `text` with the word in its middle replaced.
fn one_word_changed(text: &str) -> String {
    let mut words: Vec<&str> = text.split(' ').collect();
    let middle = words.len() / 2;
    words[middle] = "changed";
    words.join(" ")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |name: &str, ratios: &Sorted| {
            let [least, median, most] = [0.0, 0.5, 1.0].map(|q| ratios.quantile(q));
            format!("{name}: {median:.2} times the speed without guesses ({least:.2} to {most:.2})")
        };
        let foreseen = 100.0 * self.foreseen.quantile(0.5);
        writeln!(f, "{}, {foreseen:.0} % foreseen", row("the output with one word changed", &self.copied))?;
        writeln!(f, "{}", row("another output", &self.wrong))?;
        write!(f, "{}", row("no prediction", &self.none))
    }
}
