//! Small tokenizers of the two common kinds, for tests.

use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::{SpecialTokens, Tokenizer};

/// One token per byte, the given merges of two tokens, and special tokens at the end; the first of those is the tokenizer's
/// begin, the last its end of sequence.
pub(super) fn byte_level(merges: &[(&str, &str)], special: &[&str]) -> Tokenizer {
    let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let parts =
        json!({"normalizer": null, "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level});
    build(alphabet, merges, special, json!({}), parts)
}

/// One token per letter, a space put in front of every text and written `▁`, and other bytes as `<0x..>`.
pub(super) fn sentence_piece(merges: &[(&str, &str)], special: &[&str]) -> Tokenizer {
    let mut alphabet: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    alphabet.extend(('!'..='~').map(String::from));
    alphabet.push("▁".to_string());
    let normalizers = json!([
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    ]);
    let decoders = json!([
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    ]);
    let parts = json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders}
    });
    build(alphabet, merges, special, json!({"byte_fallback": true}), parts)
}

fn build(alphabet: Vec<String>, merges: &[(&str, &str)], special: &[&str], options: Value, parts: Value) -> Tokenizer {
    let merged = merges.iter().map(|(left, right)| format!("{left}{right}"));
    let vocabulary: Map<String, Value> =
        alphabet.into_iter().chain(merged).enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(index, content)| {
            json!({"id": vocabulary.len() + index, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let mut model = json!({"type": "BPE", "vocab": vocabulary, "merges": merges});
    merge(&mut model, options);
    let mut file = json!({"version": "1.0", "added_tokens": added, "model": model});
    merge(&mut file, parts);
    let inner = tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap();
    let names = special.first().zip(special.last());
    let special = names.map(|(bos, eos)| SpecialTokens::new([("bos_token", *bos), ("eos_token", *eos)]));
    Tokenizer::from_parts(inner, special.unwrap_or_default()).unwrap()
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}
