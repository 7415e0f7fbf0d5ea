//! From text files to batches of examples, through the public interface alone, with a tokenizer that is trained here.

use std::{
    fs,
    path::{Path, PathBuf},
};

use advtrain::{
    Behavior, BehaviorFiles, ChatFormat, ChatReader, ChatTemplate, ContinuationKind, Message, Sampler, SamplerSettings,
    Source, SpecialTokens, TemplatePreset, Tokenizer, Turns, encode_chats, encode_pairs, load_behavior_pairs,
    load_behaviors, load_preferences, load_targets, split_by_name,
};
use tokenizers::{
    AddedToken,
    models::bpe::{BPE, BpeTrainerBuilder},
    pre_tokenizers::byte_level::ByteLevel,
};

fn toy(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

fn trained() -> Tokenizer {
    let mut inner = tokenizers::Tokenizer::new(BPE::default());
    inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    inner.with_decoder(Some(ByteLevel::default()));
    let special = ["<bos>", "<start_of_turn>", "<end_of_turn>"].map(|token| AddedToken::from(token, true));
    let mut trainer: tokenizers::models::TrainerWrapper = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(400)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let chats = ChatReader::open(toy("chats.jsonl")).unwrap().map(Result::unwrap);
    let texts = chats.flat_map(|chat| chat.messages).map(|message| message.content);
    inner.train(&mut trainer, texts).unwrap();
    Tokenizer::from_parts(inner, SpecialTokens::new([("bos_token", "<bos>"), ("eos_token", "<end_of_turn>")])).unwrap()
}

#[test]
fn a_folder_written_here_gives_the_same_examples() {
    let template = ChatTemplate::preset(TemplatePreset::Gemma).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let format = ChatFormat::new(trained(), template.clone()).unwrap();
    format.tokenizer().save(folder.path()).unwrap();
    template.save(folder.path()).unwrap();
    let loaded = ChatFormat::load(folder.path()).unwrap();
    assert_eq!(loaded.end_ids(), format.end_ids());
    assert_eq!(loaded.template().hash(), template.hash());

    let (pairs, _) = load_preferences(toy("preferences.jsonl")).unwrap();
    let encode = |format| encode_pairs(format, &pairs, 128).unwrap().0;
    assert_eq!(encode(&loaded), encode(&format));
}

#[test]
fn text_files_become_batches() {
    let format = ChatFormat::new(trained(), ChatTemplate::preset(TemplatePreset::Gemma).unwrap()).unwrap();
    let files = BehaviorFiles {
        behaviors: toy("behaviors.csv"),
        targets: toy("targets.json"),
        safe_responses: Some(toy("safe_responses.csv")),
    };
    let (pairs, _) = load_behavior_pairs(&files).unwrap();
    let (training, validation) = split_by_name(pairs.iter().map(|pair| &pair.group), 0.3, 5).unwrap();
    assert!(!validation.is_empty());
    let groups = |rows: &[usize]| rows.iter().map(|row| pairs[*row].group.clone()).collect::<Vec<_>>();
    assert!(groups(&training).iter().all(|group| !groups(&validation).contains(group)));

    let (harmful, _) = encode_pairs(&format, &pairs, 128).unwrap();
    // The system message of one conversation is what this template refuses.
    let chats = ChatReader::open(toy("chats.jsonl")).unwrap();
    let (utility, report) = encode_chats(&format, chats, 128, Turns::All).unwrap();
    assert_eq!(report.count("refused"), 1, "{report}");
    let sampler = Sampler::new(SamplerSettings {
        robust_rows: harmful.len(),
        utility_rows: utility.len(),
        batch_size: 4,
        utility_share: 0.5,
        seed: 1,
    })
    .unwrap();
    let end = format.end_of_turn().unwrap();
    for (source, row) in sampler.batch(3) {
        let (example, kind) = match source {
            Source::Robust => (&harmful[row], ContinuationKind::Safe),
            Source::Utility => (&utility[row], ContinuationKind::Utility),
        };
        let answer = &example.continuation(kind).unwrap().tokens;
        assert_eq!(answer.ids().last(), Some(&end));
        assert_eq!(example.prompt().ids()[0], format.tokenizer().id_of("<bos>").unwrap());
    }
    let prompt = format.prompt(&[Message::user("mint tea")]).unwrap();
    assert_eq!(
        format.tokenizer().decode(prompt.ids(), false).unwrap(),
        "<bos><start_of_turn>user\nmint tea<end_of_turn>\n<start_of_turn>model\n"
    );
}

/// Files as other tools write them are read; broken ones are errors that name the file and the line or the id.
#[test]
fn odd_files_are_read_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        read_any(&path)
    };
    let deep = "[".repeat(100_000);
    let good: [(&str, &str, &str); 12] = [
        ("b.csv", "\u{feff}BehaviorID,Behavior\na,x\n", "a@2=x"),
        ("b.csv", "BehaviorID,Behavior\r\na,\"x\r\n\"\"y\"\"\"\r\n\r\nb,z", "a@2=x\n\"y\" b@5=z"),
        ("b.csv", ",BehaviorID,,Behavior\n0,a,1,x\n", "a@2=x"),
        ("b.csv", "BehaviorID,Behavior\na,x\nA,x\n", "a@2=x A@3=x"),
        ("b.csv", "BehaviorID,Behavior\né,日本\u{301}\n", "é@2=日本\u{301}"),
        ("t.json", "\u{feff}{\"a\": \"x\"}\r\n", "a=[\"x\"]"),
        ("t.json", "{\"a\": []}", "a=[]"),
        ("t.json", r#"{"\u00e9": ["\ud83d\ude00"]}"#, "é=[\"😀\"]"),
        ("c.jsonl", "\u{feff}{\"messages\": []}\r\n\r\n {\"prompt_id\": \"p\", \"messages\": []}\r\n", "c:1 p"),
        ("c.jsonl", "{\"prompt_id\": \" \", \"messages\": []}", "c:1"),
        ("c.jsonl", "", ""),
        ("p.jsonl", "\u{feff}{\"prompt\": \"é\", \"chosen\": \"a\", \"rejected\": \"b\"}", "p:1"),
    ];
    for (name, text, expected) in good {
        assert_eq!(read(name, text.as_bytes()).unwrap(), expected, "{text:?}");
    }
    let bad: Vec<(&str, Vec<u8>, &str)> = vec![
        ("b.csv", "".into(), "is empty; the first line must name its columns, Behavior among them"),
        ("b.csv", "BehaviorID,Behavior,Tags,Tags\na,x,,\n".into(), "has two columns Tags"),
        ("b.csv", "BehaviorID,Behavior\r\na,x\r\na,y\r\n".into(), "lines 2 and 3 have the same BehaviorID a"),
        ("b.csv", "BehaviorID,Behavior\na,x\nb,\"y\nc,z\n".into(), "line 3: quotes are opened and never closed"),
        ("b.csv", "BehaviorID,Behavior\na\n".into(), "line: 2"),
        ("b.csv", b"BehaviorID,Behavior\na,\xff\n".into(), "valid UTF-8"),
        ("t.json", "".into(), "EOF"),
        ("t.json", "{\"a\": [\"x\"".into(), "a: EOF"),
        ("t.json", "{\"a\": \"x\"} {\"b\": \"y\"}".into(), "trailing characters at line 1 column 12"),
        ("t.json", "{\"a\": [\"x\", null]}".into(), "a: a text or a list of texts"),
        ("t.json", "{\"a\": 1e999}".into(), "a: number out of range"),
        ("t.json", format!("{{\"a\": {deep}").into(), "recursion limit exceeded"),
        ("t.json", b"{\"a\": \"\xff\"}".into(), "valid UTF-8"),
        ("c.jsonl", "[{\"messages\": []}]".into(), "line 1: does not begin with {"),
        ("c.jsonl", "{\"messages\": []}\n[\"id\", []]\n".into(), "line 2: does not begin with {"),
        ("c.jsonl", "{\n\"messages\": []\n}".into(), "line 1: EOF"),
        ("c.jsonl", "{\"messages\": []}{\"messages\": []}".into(), "line 1: trailing characters at column 17"),
        ("c.jsonl", "{\"messages\": [], \"messages\": []}".into(), "line 1: duplicate field `messages`"),
        ("c.jsonl", b"{\"messages\": []}\n\xff\n{\"messages\": []}".into(), "line 2: cannot be read"),
        ("c.jsonl", format!("{{\"messages\": {deep}").into(), "line 1: invalid type: sequence"),
        ("p.jsonl", format!("{{\"prompt\": {deep}").into(), "line 1: recursion limit exceeded"),
        (
            "p.jsonl",
            "{\"id\": 1e99, \"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}".into(),
            "line 1: an id",
        ),
    ];
    for (name, bytes, expected) in bad {
        let message = read(name, &bytes).unwrap_err().to_string();
        assert!(message.contains(&format!("{name}: ")) && message.contains(expected), "{expected}: {message}");
    }
    for name in ["folder.csv", "folder.json", "folder.jsonl"] {
        let path = folder.path().join(name);
        let missing = read_any(&path).unwrap_err().to_string();
        assert!(missing.contains(&format!("{name}: No such file")), "{missing}");
        fs::create_dir(&path).unwrap();
        let message = read_any(&path).unwrap_err().to_string();
        assert!(message.contains(&format!("{name}: ")) && message.contains("Is a directory"), "{message}");
        if name.ends_with("jsonl") {
            assert_eq!(ChatReader::open(&path).unwrap().take(5).count(), 1, "one error, and no end of them");
        }
    }
}

/// What a file of behaviours, targets, preferences or chats holds, told apart by its name, in short.
fn read_any(path: &Path) -> advtrain::Result<String> {
    let name = path.file_name().unwrap().to_str().unwrap();
    let rows: Vec<String> = match name {
        _ if name.ends_with(".csv") => {
            let shown = |row: &Behavior| format!("{}@{}={}", row.id, row.line, row.behavior);
            load_behaviors(path)?.iter().map(shown).collect()
        }
        _ if name.ends_with(".json") => {
            load_targets(path)?.into_iter().map(|(id, targets)| format!("{id}={targets:?}")).collect()
        }
        "p.jsonl" => load_preferences(path)?.0.into_iter().map(|pair| pair.id).collect(),
        _ => ChatReader::open(path)?.map(|chat| Ok(chat?.id)).collect::<advtrain::Result<_>>()?,
    };
    Ok(rows.join(" "))
}
