//! The layering tables of `crates/README.md`, enforced: which module may import which. Rust does this only between crates.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use bitnet_tests::server::workspace_root;

/// bitnet-core: module -> modules it may name beside `ids`.
const CORE: &[(&str, &[&str])] = &[
    ("ids", &[]),
    ("quant", &["threads"]),
    ("kernels", &["quant", "threads"]),
    ("threads", &[]),
    ("checkpoint", &["quant"]),
    ("tokenizer", &["checkpoint"]),
    ("kv_cache", &["checkpoint", "kernels", "model", "quant", "threads"]),
    ("sampling", &["kernels"]),
    ("model", &["checkpoint", "quant", "kernels", "kv_cache", "threads"]),
];

const CRATES: [&str; 3] = ["bitnet-core", "bitnet-server", "bitnet-cli"];

/// bitnet-server: module -> modules it may name. Siblings of a layer never meet.
const L0: &[&str] = &["config", "openai", "metrics"];
const L1: &[&str] = &["limits", "filter", "prompt", "output", "response_cache", "grammar", "storage", "engine"];

#[test]
fn imports_of_bitnet_core_point_one_way() {
    let allowed = CORE.iter().map(|(module, list)| (*module, list.to_vec())).collect();
    check("crates/bitnet-core/src", &allowed, &["ids"]);
}

#[test]
fn imports_of_bitnet_server_point_down() {
    let mut allowed: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for module in L0 {
        allowed.insert(module, Vec::new());
    }
    for module in L1 {
        allowed.insert(module, L0.to_vec());
    }
    allowed.insert("service", [L0, L1].concat());
    allowed.insert("load", [L0, L1, &["service"]].concat());
    allowed.insert("http", [L0, L1, &["service"]].concat());
    allowed.insert("shutdown", vec!["engine", "service"]);
    allowed.insert("batch", [L0, &["storage", "service", "http"]].concat());
    check("crates/bitnet-server/src", &allowed, &[]);
}

#[test]
fn unsafe_code_lives_where_the_architecture_says() {
    // Their tests and benches too.
    let crates = CRATES.map(|name| format!("crates/{name}"));
    for (_, file) in crates.iter().flat_map(|name| sources(name)).chain(sources("tests/src")) {
        let name = file.strip_prefix(workspace_root()).expect("inside").display().to_string();
        let may = ["/kernels/", "/threads", "/checkpoint/map.rs"].iter().any(|part| name.contains(part));
        let text = code(&file);
        assert!(may || !text.contains("allow(unsafe_code)"), "{name} allows unsafe code");
        assert!(may || !text.contains("unsafe {"), "{name} has an unsafe block");
    }
}

/// Every `crate::MODULE` in a module's files must be itself, in its list, or in `everyone`.
fn check(root: &str, allowed: &BTreeMap<&str, Vec<&str>>, everyone: &[&str]) {
    let mut seen = 0;
    for (module, file) in sources(root) {
        if module == "lib" {
            continue;
        }
        let list =
            allowed.get(module.as_str()).unwrap_or_else(|| panic!("{module} is in no layer: {}", file.display()));
        for imported in imports(&code(&file)) {
            let fine = imported == module || everyone.contains(&imported.as_str()) || list.contains(&imported.as_str());
            assert!(fine, "{} imports {imported}", file.display());
            seen += 1;
        }
    }
    assert!(seen > 0, "no import was found below {root}: the test reads nothing");
}

/// `(top-level module, file)` of every source file below `root`.
fn sources(root: &str) -> Vec<(String, PathBuf)> {
    let root = workspace_root().join(root);
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the folder is there") {
            let path = entry.expect("an entry").path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let relative = path.strip_prefix(&root).expect("below the root");
                let first = relative.components().next().expect("a component");
                let module = Path::new(first.as_os_str()).file_stem().expect("a name");
                found.push((module.to_string_lossy().into_owned(), path));
            }
        }
    }
    assert!(!found.is_empty(), "no sources below {}", root.display());
    found
}

/// The text of `file` without comments.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).expect("the source is readable");
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Names after `crate::`, those in braces included.
fn imports(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            names.extend(top_level_names(group));
        } else {
            names.extend(word(rest));
        }
    }
    names.retain(|name| name.chars().next().is_some_and(char::is_lowercase));
    names
}

/// First words of the items of `{a::b, c::{d, e}}`, given what follows the brace.
fn top_level_names(group: &str) -> Vec<String> {
    let (mut depth, mut names, mut start) = (0_usize, Vec::new(), true);
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => start = true,
            c if start && !c.is_whitespace() => {
                names.extend(word(&group[i..]));
                start = false;
            }
            _ => {}
        }
    }
    names
}

fn word(text: &str) -> Option<String> {
    let name: String = text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}
