//! Every rule, walked by random allowed tokens of a small vocabulary: whatever ends, ends as the rule says.

use std::sync::Arc;

use bitnet_core::{TokenId, Tokenizer, checkpoint::TokenizerSource};
use serde_json::{Value, json};

use super::*;

/// A golden checkpoint's tokenizer: 512 ids, byte-level.
fn compiler() -> (GrammarCompiler, Arc<Tokenizer>) {
    let json = include_str!("../../../../tests/golden/public/p1_packed/tokenizer.json").into();
    let source = TokenizerSource::HuggingFace { json, bos: None };
    let tokenizer = Arc::new(Tokenizer::from_source(&source).unwrap());
    let stop = [STOP].map(|text| tokenizer.token_id(text).unwrap());
    (GrammarCompiler::new(Arc::clone(&tokenizer), &stop), tokenizer)
}

const STOP: &str = "<|eot_id|>";

/// A text by `rule` of random allowed tokens; `None` when it did not end in time.
fn walk(compiler: &GrammarCompiler, tokenizer: &Tokenizer, rule: &Rule, seed: u64) -> Option<String> {
    let stop = tokenizer.token_id(STOP).unwrap();
    let mut matcher = compiler.compile(rule, "rule").unwrap_or_else(|error| panic!("{error}: {rule:?}")).start();
    let (mut random, mut ids) = (seed.wrapping_mul(2) + 1, Vec::new());
    for _ in 0..400 {
        let mask = matcher.mask().unwrap();
        let allowed: Vec<_> = (0..tokenizer.vocab_size() as u32).map(TokenId).filter(|id| mask.contains(*id)).collect();
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let id = allowed[(random >> 33) as usize % allowed.len()];
        if id == stop || (mask.contains(stop) && random >> 60 < 4) {
            return Some(tokenizer.decode(&ids, true));
        }
        assert!(!tokenizer.is_special(id));
        ids.push(id);
        matcher.accept(id).unwrap();
    }
    None
}

/// Texts of `rule`, at least one of `tries`.
fn texts(rule: &Rule, tries: u64) -> Vec<String> {
    let (compiler, tokenizer) = compiler();
    let texts: Vec<_> = (0..tries).filter_map(|seed| walk(&compiler, &tokenizer, rule, seed)).collect();
    assert!(!texts.is_empty(), "nothing ended: {rule:?}");
    texts
}

#[test]
fn json_is_compact_and_has_its_members() {
    let schema = json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b\n\"c"]},
            "count": {"type": "integer", "minimum": -3, "maximum": 250},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
            "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]}
        },
        "required": ["kind", "count", "tags", "next"],
        "additionalProperties": false,
        "$defs": {"leaf": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": false}}
    });
    for text in texts(&Rule::Schema(schema), 20) {
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(text.starts_with("{\"kind\":\"") && text.contains(",\"count\":"), "{text}");
        assert!(["a", "b\n\"c"].contains(&value["kind"].as_str().unwrap()), "{text}");
        assert!((-3..=250).contains(&value["count"].as_i64().unwrap()), "{text}");
        assert!((1..=3).contains(&value["tags"].as_array().unwrap().len()), "{text}");
        assert!(value["next"].is_null() || value["next"]["x"].is_boolean(), "{text}");
    }
}

#[test]
fn json_object_is_an_object() {
    for text in texts(&Rule::json_object(), 30) {
        match serde_json::from_str::<Value>(&text) {
            Ok(value) => assert!(value.is_object(), "{text}"),
            // JSON, though no f64: `1e999`.
            Err(error) => assert!(error.to_string().starts_with("number out of range"), "{error}: {text}"),
        }
    }
}

#[test]
fn expressions_choices_and_grammars_hold() {
    for text in texts(&Rule::Regex("[a-c]{2,5}-[0-9]".to_owned()), 10) {
        let (letters, digit) = text.split_once('-').unwrap();
        assert!(
            (2..=5).contains(&letters.len()) && letters.bytes().all(|byte| (b'a'..=b'c').contains(&byte)),
            "{text}"
        );
        assert!(digit.len() == 1 && digit.as_bytes()[0].is_ascii_digit(), "{text}");
    }
    let choices = ["yes", "no \"quoted\"", "y\\e\n"].map(str::to_owned);
    let said = texts(&Rule::Choice(choices.to_vec()), 20);
    assert!(said.iter().all(|text| choices.contains(text)), "{said:?}");
    assert!(choices.iter().all(|text| said.contains(text)), "{said:?}");
    for text in texts(&Rule::Lark("start: \"<\" NAME \">\"\nNAME: /[a-z]+/".to_owned()), 5) {
        assert!(text.starts_with('<') && text.ends_with('>'), "{text}");
    }
}

fn functions() -> Vec<Function> {
    let schema = json!({"properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"], "additionalProperties": false});
    vec![
        Function { name: "count-up".to_owned(), parameters: Some(schema), path: "tools[0]".to_owned() },
        Function { name: "stop_now".to_owned(), parameters: None, path: "tools[1]".to_owned() },
    ]
}

fn calls(text: &str) -> Vec<Value> {
    let parts = text.split(CALL_START).skip(1);
    parts.map(|part| serde_json::from_str(part.trim_end().strip_suffix(CALL_END).unwrap()).unwrap()).collect()
}

#[test]
fn required_calls_are_made_with_arguments_that_validate() {
    for parallel in [false, true] {
        let rule = CallRule { functions: functions(), required: true, parallel, otherwise: None };
        let texts = texts(&Rule::Calls(rule), 20);
        assert!(texts.iter().any(|text| calls(text).len() > 1) == parallel);
        for text in texts {
            assert!(text.starts_with(CALL_START), "{text}");
            for call in calls(&text) {
                match call["name"].as_str().unwrap() {
                    "count-up" => assert!(call["arguments"]["n"].as_u64().unwrap() <= 9, "{text}"),
                    name => assert_eq!((name, &call["arguments"]), ("stop_now", &json!({})), "{text}"),
                }
            }
        }
    }
}

#[test]
fn without_calls_the_text_is_free_or_keeps_its_form() {
    let free = CallRule { functions: functions(), required: false, parallel: true, otherwise: None };
    let (compiler, tokenizer) = compiler();
    let mut matcher = compiler.compile(&Rule::Calls(free.clone()), "tools").unwrap().start();
    let encode = |text: &str| {
        tokenizer
            .encode(text, bitnet_core::tokenizer::EncodeOptions { add_special_tokens: false, parse_special: false })
    };
    // Any text may go on and may end, up to the tag; then only a call may come.
    for id in encode("Say < or <tool, ").unwrap() {
        assert!(matcher.mask().unwrap().contains(id));
        matcher.accept(id).unwrap();
    }
    let stop = tokenizer.token_id(STOP).unwrap();
    assert!(matcher.mask().unwrap().contains(stop));
    for id in encode("<tool_call>").unwrap() {
        matcher.accept(id).unwrap();
    }
    let mask = matcher.mask().unwrap();
    assert!(!mask.contains(stop) && !mask.contains(encode("x").unwrap()[0]) && mask.contains(encode("{").unwrap()[0]));
    let formed = CallRule { otherwise: Some(json!({"enum": ["a", "b"]})), ..free };
    for text in texts(&Rule::Calls(formed), 20) {
        assert!(text == "\"a\"" || text == "\"b\"" || !calls(&text).is_empty(), "{text}");
    }
}

#[test]
fn what_cannot_be_compiled_is_an_error_and_no_crash() {
    let (compiler, _) = compiler();
    let deep_regex = format!("{}a{}", "(".repeat(20_000), ")".repeat(20_000));
    let chain: serde_json::Map<_, _> = (0..1500)
        .map(|i| (i.to_string(), json!({"$ref": format!("#/$defs/{}", i + 1)})))
        .chain([("1500".to_owned(), json!({}))])
        .collect();
    let rules = [
        Rule::Regex("[a-".to_owned()),
        Rule::Regex("(?=a)b".to_owned()),
        Rule::Regex(deep_regex),
        Rule::Lark("start: missing".to_owned()),
        Rule::Lark(String::new()),
        Rule::Schema(json!({"type": "string", "pattern": "(?<=x)y"})),
        Rule::Schema(json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})),
        Rule::Schema(json!({"allOf": [{"type": "integer"}, {"type": "string"}]})),
        Rule::Schema(
            json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}, "required": ["a"]}),
        ),
    ];
    for rule in rules {
        let error = compiler.compile(&rule, "here").expect_err(&format!("{rule:?}"));
        assert!(error.message.len() <= 300 && !error.message.contains('\n'), "{error}");
    }
    // Long chains and products are work, not a crash.
    let _ = compiler.compile(&Rule::Regex("((a{1,900}){1,900}){1,900}".to_owned()), "here");
    let _ = compiler.compile(&Rule::Schema(json!({"$ref": "#/$defs/0", "$defs": chain})), "here");
}

#[test]
fn equal_rules_have_equal_names() {
    let (compiler, _) = compiler();
    let identity = |rule: &Rule| compiler.compile(rule, "rule").unwrap().identity().to_vec();
    assert_eq!(identity(&Rule::json_object()), identity(&Rule::Schema(json!({"type": "object"}))));
    assert_ne!(identity(&Rule::json_object()), identity(&Rule::Schema(json!({"type": "array"}))));
    assert_ne!(identity(&Rule::Regex("a".to_owned())), identity(&Rule::Regex("b".to_owned())));
}

#[test]
fn looking_ahead_says_what_comes_step_by_step() {
    let (compiler, tokenizer) = compiler();
    let stop = tokenizer.token_id(STOP).unwrap();
    let schema = json!({
        "type": "object",
        "properties": {"zq\u{1f600}": {"enum": ["xyzzy", "xyzzz"]}, "other_name": {"type": "integer"}},
        "required": ["zq\u{1f600}", "other_name"],
        "additionalProperties": false
    });
    let grammar = compiler.compile(&Rule::Schema(schema), "rule").unwrap();
    let (mut num_forced, mut num_likely) = (0, 0);
    for seed in 0..20 {
        let (mut plain, mut ahead, mut said) = (grammar.start(), grammar.start(), 0);
        for at in 0..200 {
            let Outlook { forced, then, likely } = ahead.look_ahead(5, &[stop]);
            assert!(forced.len() + likely.len() <= 5);
            num_forced += forced.len();
            for token in forced {
                assert_eq!(plain.mask().unwrap().single(), Some(token));
                plain.accept(token).unwrap();
            }
            let (mut matcher, mask) = then.unwrap();
            assert_eq!(mask, plain.mask().unwrap());
            if let Some(&first) = likely.first() {
                assert!(mask.contains(first), "the tokenizer's way to write it is one of those allowed");
                num_likely += 1;
            }
            let allowed: Vec<_> = (0..512).map(TokenId).filter(|id| mask.contains(*id)).collect();
            let token = allowed[(seed * 31 + at * 17) % allowed.len()];
            said += 1;
            if token == stop {
                break;
            }
            plain.accept(token).unwrap();
            matcher.accept(token).unwrap();
            ahead = matcher;
        }
        assert!(said > 2);
    }
    assert!(num_forced > 100 && num_likely > 20, "{num_forced} forced, {num_likely} likely");
}

#[test]
fn a_rule_is_compiled_once_while_it_is_in_use() {
    let (compiler, _) = compiler();
    let rule = |number: usize| Rule::Regex(format!("a{{{number}}}"));
    let first = compiler.compile(&rule(1), "response_format").unwrap();
    assert!(Arc::ptr_eq(&first, &compiler.compile(&rule(1), "tools[0]").unwrap()), "wherever it comes from");
    for number in 2..2 + MAX_COMPILED.get() {
        compiler.compile(&rule(number), "rule").unwrap();
    }
    assert!(!Arc::ptr_eq(&first, &compiler.compile(&rule(1), "rule").unwrap()), "the least recently used has left");
    let long = Rule::Choice(vec!["x".repeat(MAX_KEPT_BYTES)]);
    let [one, other] = [(); 2].map(|()| compiler.compile(&long, "rule").unwrap());
    assert!(!Arc::ptr_eq(&one, &other) && one.identity() == other.identity());
    let wrong = Rule::Regex("(".to_owned());
    assert!(compiler.compile(&wrong, "rule").is_err() && compiler.compile(&wrong, "rule").is_err());
}
