//! Against transformers, PEFT and a real model. `make test-real` prepares what they need and runs them.

mod common;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use advtrain::{
    AdvUlLoss, AdversarialTrainer, AttackSettings, Batch, BehaviorFiles, CausalLm, ChatFormat, ChatReader,
    ChatTemplate, Decoder, Example, Framing, Generation, Input, LoraConfig, Message, OptimizerConfig, Pass, Pgd,
    QuestionForm, SearchPrompt, StringPlace, SupervisedLoss, TokenKind, TokenSearch, TokenSearchSettings, Tokens,
    TrainSettings, TrainableLm, TrainingData, Turns, accuracy, encode_chats, encode_pairs, load_arc,
    load_behavior_pairs, load_mmlu, score_choices,
    tch::{Device, Kind, Tensor},
};
use common::{assert_close, distance, fixture, read};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// The folder that `make test-real` fills.
fn real() -> PathBuf {
    std::env::var_os("ADVTRAIN_REAL").expect("ADVTRAIN_REAL is not set: run `make test-real`").into()
}

fn smollm2() -> PathBuf {
    real().join("smollm2")
}

/// Which transformers the reference script runs on.
#[derive(Clone, Copy, Debug)]
enum Transformers {
    Four,
    Five,
}

fn reference(version: Transformers, arguments: &[&dyn AsRef<std::ffi::OsStr>]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/reference.py");
    let mut command = Command::new(real().join("venv/bin/python"));
    command.arg(script).args(arguments.iter().map(|argument| argument.as_ref()));
    if matches!(version, Transformers::Four) {
        command.env("PYTHONPATH", real().join("tf4"));
    }
    // The program's own library path leads to the same libtorch, but not to what Python's needs beside it.
    let output = command.env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert!(output.status.success(), "{version:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn ids(vocabulary: i64) -> Vec<Vec<i64>> {
    let row = |len: i64, step: i64| (0..len).map(|at| (1 + at * step) % vocabulary).collect();
    vec![row(9, 7), row(23, 31)]
}

fn logits(model: &Decoder, ids: &[i64]) -> Tensor {
    let prompt = Tokens::of_kind(ids.to_vec(), TokenKind::Template);
    let batch = Batch::new(vec![Example::new("e", prompt, Vec::new()).unwrap()], Device::Cpu).unwrap();
    let hidden = model.hidden(&Input::of_batch(model, &batch, None, Pass::default()).unwrap()).unwrap();
    model.logits(&hidden.last).unwrap().detach()
}

/// Checks that transformers computes our logits from a folder that we wrote.
fn assert_same(model: &Decoder, folder: &Path, adapter: Option<&Path>, version: Transformers, tolerance: f64) {
    let work = tempfile::tempdir().unwrap();
    let (ids_file, out) = (work.path().join("ids.json"), work.path().join("out.safetensors"));
    let rows = ids(model.vocabulary());
    std::fs::write(&ids_file, json!(rows).to_string()).unwrap();
    let dtype = if model.kind() == Kind::BFloat16 { "bfloat16" } else { "float32" };
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> =
        vec![&"logits", &folder, &"--dtype", &dtype, &"--ids", &ids_file, &"--out", &out];
    if let Some(adapter) = &adapter {
        arguments.extend([&"--adapter" as &dyn AsRef<std::ffi::OsStr>, adapter]);
    }
    reference(version, &arguments);
    let expected = read(out);
    for (index, row) in rows.iter().enumerate() {
        let what = format!("{}, {version:?}, row {index}", folder.display());
        assert_close(&what, &logits(model, row), &expected[&format!("logits.{index}")], tolerance);
    }
}

/// An adapter whose B is not zero.
fn with_adapter(mut model: Decoder) -> Decoder {
    model.add_lora(&LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() }, 1).unwrap();
    let _guard = advtrain::tch::no_grad_guard();
    for (index, mut parameter) in model.parameters().into_iter().enumerate() {
        if parameter.name.contains("lora_B") {
            let count = parameter.tensor.numel() as i64;
            let values = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.7 + index as f64).sin() * 0.02;
            parameter.tensor.copy_(&values.view_as(&parameter.tensor));
        }
    }
    model
}

#[test]
#[ignore = "needs what `make test-real` prepares"]
fn logits_of_a_real_model_equal_transformers() {
    let model = Decoder::load(smollm2(), Kind::Float, Device::Cpu).unwrap();
    assert_same(&model, &smollm2(), None, Transformers::Five, 1e-4);
}

#[test]
#[ignore = "needs what `make test-real` prepares"]
fn greedy_answers_equal_transformers_token_for_token() {
    const TOKENS: usize = 24;
    let requests = [
        "What is the capital of France?",
        "Write a haiku about the sea.",
        "List three fruits.",
        "How do I boil an egg?",
        "Translate 'good morning' into Spanish.",
        "What is 12 plus 30?",
        "Why is the sky blue? Answer in one sentence.",
        "Name a famous painter and one of their works, please.",
        "Explain photosynthesis to a child.",
        "Hi",
    ];
    let work = tempfile::tempdir().unwrap();
    let (prompts, out) = (work.path().join("prompts.json"), work.path().join("out.json"));
    std::fs::write(&prompts, json!(requests).to_string()).unwrap();
    let count = TOKENS.to_string();
    reference(
        Transformers::Five,
        &[&"generate", &smollm2(), &"--prompts", &prompts, &"--tokens", &count, &"--out", &out],
    );
    let expected: Value = serde_json::from_str(&std::fs::read_to_string(out).unwrap()).unwrap();

    let model = Decoder::load(smollm2(), Kind::Float, Device::Cpu).unwrap();
    let format = ChatFormat::load(smollm2()).unwrap();
    let settings = Generation { max_new_tokens: TOKENS, end_ids: format.end_ids(), sampling: None };
    let examples: Vec<Example> = (requests.iter().enumerate())
        .map(|(index, text)| {
            let prompt = format.prompt(&[Message::user(*text)]).unwrap();
            Example::new(index.to_string(), prompt, Vec::new()).unwrap()
        })
        .collect();
    let list = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect::<Vec<_>>();
    let together = Batch::new(examples.clone(), Device::Cpu).unwrap();
    let together = model.generate(&together, None, &settings).unwrap();
    for (index, example) in examples.into_iter().enumerate() {
        let expected = &expected["prompts"][index];
        assert_eq!(example.prompt().ids(), list(&expected["ids"]), "prompt {index}");
        let alone = Batch::new(vec![example], Device::Cpu).unwrap();
        let alone = model.generate(&alone, None, &settings).unwrap().remove(0);
        assert_eq!(alone, list(&expected["single"]), "prompt {index} alone");
        assert_eq!(together[index], list(&expected["batched"]), "prompt {index} in a batch");
    }
}

#[test]
#[ignore = "needs what `make test-real` prepares"]
fn peft_loads_our_adapter_and_transformers_our_merged_model() {
    for name in
        ["gemma-mqa", "phi3", "phi3-longrope", "phi3-partial", "mistral", "llama", "llama3", "llama-linear", "qwen2"]
    {
        let base = fixture("models").join(name);
        let model = with_adapter(Decoder::load(&base, Kind::Float, Device::Cpu).unwrap());
        let work = tempfile::tempdir().unwrap();
        let (adapter, merged) = (work.path().join("adapter"), work.path().join("merged"));
        model.save_lora(&adapter, &base.to_string_lossy()).unwrap();
        model.save(&merged).unwrap();
        assert_same(&model, &base, Some(&adapter), Transformers::Five, 1e-4);
        for version in [Transformers::Four, Transformers::Five] {
            assert_same(&model, &merged, None, version, 1e-4);
        }
    }
}

/// SmolLM2 after two updates of C-AdvUL on the toy data of the fixtures.
fn trained_smollm2() -> Decoder {
    let data = |name: &str| fixture("data").join(name);
    let format = ChatFormat::load(smollm2()).unwrap();
    let files = BehaviorFiles {
        behaviors: data("behaviors.csv"),
        targets: data("targets.json"),
        safe_responses: Some(data("safe_responses.csv")),
    };
    let (robust, _) = encode_pairs(&format, &load_behavior_pairs(&files).unwrap().0, 128).unwrap();
    let chats = ChatReader::open(data("chats.jsonl")).unwrap();
    let (utility, _) = encode_chats(&format, chats, 128, Turns::All).unwrap();
    let mut model = Decoder::load(smollm2(), Kind::Float, Device::Cpu).unwrap();
    model.add_lora(&LoraConfig::default(), 0).unwrap();
    let mut trainer = AdversarialTrainer::builder(model)
        .attack(Pgd { steps: 2, ..Pgd::default() }, AttackSettings::default())
        .robust(AdvUlLoss::default())
        .utility(SupervisedLoss::default())
        .data(TrainingData { robust, utility })
        .settings(TrainSettings {
            max_updates: Some(2),
            batch_size: 4,
            utility_share: 0.5,
            optimizer: OptimizerConfig { learning_rate: 1e-3, ..OptimizerConfig::default() },
            ..TrainSettings::default()
        })
        .build()
        .unwrap();
    for _ in 0..2 {
        let metrics = trainer.step().unwrap();
        let attack = metrics.attack.unwrap();
        assert!(attack.objective_last < attack.objective_first - 0.1, "{attack:?}");
    }
    trainer.into_model()
}

#[test]
#[ignore = "needs what `make test-real` prepares"]
fn what_a_trained_real_model_leaves_gives_our_logits_in_peft_and_transformers() {
    let model = trained_smollm2();
    let original = Decoder::load(smollm2(), Kind::Float, Device::Cpu).unwrap();
    let row = &ids(model.vocabulary())[1];
    assert!(distance(&logits(&model, row), &logits(&original, row)) > 1e-3, "training changed nothing");
    let work = tempfile::tempdir().unwrap();
    let (adapter, merged) = (work.path().join("adapter"), work.path().join("merged"));
    model.save_lora(&adapter, "smollm2").unwrap();
    model.save(&merged).unwrap();
    assert_same(&model, &smollm2(), Some(&adapter), Transformers::Five, 1e-4);
    for version in [Transformers::Four, Transformers::Five] {
        assert_same(&model, &merged, None, version, 1e-4);
    }
}

/// Shards, bfloat16, and folders of the older dialect. bfloat16 is equal bit for bit where both run the same kernels, and
/// else off by at most 1.6e-2, as tests/parity.rs has it.
#[test]
#[ignore = "needs what `make test-real` prepares"]
fn every_kind_of_folder_that_we_write_is_read_by_transformers() {
    let saves: [(&str, Kind, usize, f64); 4] = [
        ("llama3", Kind::Float, 20_000, 1e-4),
        ("gemma-mqa", Kind::Float, 20_000, 1e-4),
        ("gemma-mqa", Kind::BFloat16, usize::MAX, 3e-2),
        ("phi3", Kind::BFloat16, 20_000, 3e-2),
    ];
    for (name, kind, largest, tolerance) in saves {
        let model = Decoder::load(fixture("models").join(name), kind, Device::Cpu).unwrap();
        let folder = tempfile::tempdir().unwrap();
        model.save_in_shards(&folder, largest).unwrap();
        assert_eq!(folder.path().join("model.safetensors.index.json").exists(), largest == 20_000);
        for version in [Transformers::Four, Transformers::Five] {
            assert_same(&model, folder.path(), None, version, tolerance);
        }
    }
    for older in std::fs::read_dir(fixture("models_v4")).unwrap() {
        let older = older.unwrap().path();
        let (source, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let newer = fixture("models").join(older.file_name().unwrap());
        for file in [older.join("config.json"), newer.join("model.safetensors")] {
            std::fs::copy(&file, source.path().join(file.file_name().unwrap())).unwrap();
        }
        let model = Decoder::load(&source, Kind::Float, Device::Cpu).unwrap();
        model.save(&folder).unwrap();
        for version in [Transformers::Four, Transformers::Five] {
            assert_same(&model, folder.path(), None, version, 1e-4);
        }
    }
}

/// The files that make a merged folder one that serves chats, with the model's own template and with another.
#[test]
#[ignore = "needs what `make test-real` prepares"]
fn transformers_reads_the_tokenizer_and_template_of_a_merged_folder_as_we_do() {
    let own = ChatFormat::load(smollm2()).unwrap();
    let another = ChatTemplate::from_source(
        "{% for message in messages %}<|im_start|>{{ message.content | trim }}\n{% endfor %}",
        own.tokenizer().special_tokens(),
    );
    let another = ChatFormat::new(own.tokenizer().clone(), another.unwrap()).unwrap();
    let chats = [
        vec![Message::user("  Où est-ce?\n\n\tナイン 🦀 <|im_end|> x")],
        vec![
            Message::system("Be brief."),
            Message::user("One plus one?"),
            Message::assistant("Two."),
            Message::user("And \"two\" plus {{ two }}?"),
        ],
    ];
    let model = Decoder::load(smollm2(), Kind::BFloat16, Device::Cpu).unwrap();
    let work = tempfile::tempdir().unwrap();
    let (prompts, out) = (work.path().join("prompts.json"), work.path().join("out.json"));
    std::fs::write(&prompts, json!(chats).to_string()).unwrap();
    let mut read = Vec::new();
    for format in [&own, &another] {
        let merged = tempfile::tempdir().unwrap();
        model.save(&merged).unwrap();
        format.tokenizer().save(&merged).unwrap();
        format.template().save(&merged).unwrap();
        for version in [Transformers::Four, Transformers::Five] {
            reference(version, &[&"render", &merged.path(), &"--prompts", &prompts, &"--out", &out]);
            let expected: Value = serde_json::from_str(&std::fs::read_to_string(&out).unwrap()).unwrap();
            for (chat, expected) in chats.iter().zip(expected.as_array().unwrap()) {
                assert_eq!(json!(format.template().render(chat, true).unwrap()), expected["text"], "{version:?}");
                assert_eq!(json!(format.prompt(chat).unwrap().ids()), expected["ids"], "{version:?}");
            }
            read.push(expected);
        }
    }
    assert_ne!(read[0], read[2], "the template of the folder was not the one read");
}

fn loaded() -> (Decoder, ChatFormat) {
    (Decoder::load(smollm2(), Kind::Float, Device::Cpu).unwrap(), ChatFormat::load(smollm2()).unwrap())
}

fn string_search<'a>(model: &'a Decoder, format: &'a ChatFormat, record: &Value, seed: u64) -> TokenSearch<'a> {
    let text = |name: &str| record[name].as_str().unwrap().to_string();
    let place = StringPlace::new(vec![Message::user(text("request"))], "").unwrap();
    let placed = place.encode(format, &text("start")).unwrap();
    assert_eq!(json!(placed.string), record["string_ids"]);
    let opening = format.opening(&place.messages(&text("start")), &text("target")).unwrap();
    assert_eq!(json!(opening.continuation.ids()), record["target_ids"]);
    let (before, behind) = (placed.before.clone(), placed.behind.clone());
    let prompt = SearchPrompt { before, behind, target: opening.continuation.ids().to_vec() };
    let settings = TokenSearchSettings {
        width: record["width"].as_u64().unwrap() as usize,
        rows: 16,
        ..TokenSearchSettings::default()
    };
    let (start, allowed) = ([placed.string.clone()], format.tokenizer().printable_ids(true).unwrap());
    let reads_back = move |ids: &[i64]| Ok(place.string_of(format, &placed, ids)?.is_some());
    let random = ChaCha8Rng::seed_from_u64(seed);
    TokenSearch::new(model, &[prompt], &start, &allowed, settings, random, Box::new(reads_back)).unwrap()
}

fn recorded(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|one| one.as_f64().unwrap()).collect()
}

#[test]
#[ignore = "needs a real model: make test-real"]
fn gcg_computes_what_nanogcg_computes() {
    let record = recorded("nanogcg.json");
    let (model, format) = loaded();
    let mut search = string_search(&model, &format, &record, 0);
    let gradient = search.gradients().unwrap().remove(0);
    let norm = record["gradient"]["norm"].as_f64().unwrap();
    assert!((gradient.norm().double_value(&[]) / norm - 1.0).abs() < 1e-4);
    let samples = record["gradient"]["numbers"].as_array().unwrap();
    let largest = samples.iter().map(|sample| sample[2].as_f64().unwrap().abs()).fold(0.0, f64::max);
    for sample in samples {
        let [position, token] = [0, 1].map(|at| sample[at].as_i64().unwrap());
        let difference = gradient.double_value(&[position, token]) - sample[2].as_f64().unwrap();
        assert!(difference.abs() < 1e-4 * largest, "position {position}, token {token}: {difference}");
    }
    let candidates: Vec<Vec<i64>> = serde_json::from_value(record["candidates"]["ids"].clone()).unwrap();
    let losses = search.losses(&candidates).unwrap();
    let expected = numbers(&record["candidates"]["losses"]);
    assert!(!losses.is_empty() && losses.len() == expected.len());
    for (found, expected) in losses.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-4 * expected, "{found} instead of {expected}");
    }
}

/// As many steps with the same settings: the mean of our best losses is no worse than nanoGCG's by more than two standard
/// errors of the difference.
#[test]
#[ignore = "needs a real model: make test-real"]
fn gcg_searches_as_well_as_nanogcg() {
    let record = recorded("nanogcg.json");
    let (model, format) = loaded();
    let steps = record["steps"].as_u64().unwrap();
    let theirs: Vec<f64> = record["runs"].as_array().unwrap().iter().map(|run| run["best"].as_f64().unwrap()).collect();
    let run = |seed| {
        let mut search = string_search(&model, &format, &record, seed);
        (0..steps).for_each(|_| drop(search.step().unwrap()));
        search.best().loss
    };
    let ours: Vec<f64> = (0..theirs.len() as u64).map(run).collect();
    println!("best losses, ours {ours:?}, nanoGCG's {theirs:?}");
    let ([mean, variance], [their_mean, their_variance]) = (mean_and_variance(&ours), mean_and_variance(&theirs));
    let error = ((variance + their_variance) / ours.len() as f64).sqrt();
    assert!(mean - their_mean <= 2.0 * error, "{mean} instead of {their_mean}, the standard error being {error}");
}

fn mean_and_variance(numbers: &[f64]) -> [f64; 2] {
    let count = numbers.len() as f64;
    let mean = numbers.iter().sum::<f64>() / count;
    [mean, numbers.iter().map(|number| (number - mean).powi(2)).sum::<f64>() / (count - 1.0)]
}

#[test]
#[ignore = "needs a real model: make test-real"]
fn questions_are_scored_as_the_harness_scores_them() {
    let record = recorded("harness.json");
    let (model, format) = loaded();
    let of_mmlu = |part: &str| load_mmlu(fixture(&format!("data/mmlu/{part}/common_birds_{part}.csv"))).unwrap();
    let letters = QuestionForm::Letters { subject: "common birds".into(), examples: of_mmlu("dev") };
    let sets = [
        ("toy_arc", load_arc(fixture("data/arc.jsonl")).unwrap(), QuestionForm::FullAnswers),
        ("toy_mmlu", of_mmlu("test"), letters),
    ];
    for (task, items, form) in sets {
        let score = |item| score_choices(&model, &format, item, &form, Framing::Text { bos: false }).unwrap();
        let scores: Vec<_> = items.iter().map(score).collect();
        let expected = record[task]["log_likelihoods"].as_array().unwrap();
        assert_eq!(scores.len(), expected.len());
        for (found, expected) in scores.iter().zip(expected) {
            assert_eq!(found.log_likelihoods.len(), expected.as_array().unwrap().len(), "{task}");
            for (found, expected) in found.log_likelihoods.iter().zip(numbers(expected)) {
                assert!((found - expected).abs() < 1e-4 * expected.abs(), "{task}: {found} instead of {expected}");
            }
        }
        let (acc, acc_norm) = accuracy(&scores);
        assert_eq!(Some(acc.share()), record[task]["acc"].as_f64(), "{task}");
        if let Some(expected) = record[task]["acc_norm"].as_f64() {
            assert_eq!(acc_norm.share(), expected, "{task}");
        }
    }
}
