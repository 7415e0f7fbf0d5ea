//! The job: load, measure, train, measure, write everything down.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use advtrain::{
    AdversarialTrainer, AnswerPair, BehaviorFiles, CausalLm, Chat, ChatFormat, ChatReader, ChatTemplate, Decoder,
    Dtype, Example, Finish, JsonLines, LoadReport, ModelCard, Progress, RunConfig, TensorBoard, Tokenizer,
    TrainingData, device, encode_chats, encode_pairs, load_behavior_pairs, split_by_name, tch::Device,
};
use anyhow::{Context, Result};

use super::{
    arguments::{Arguments, Files},
    evaluation::{HeldOut, Measured, Measuring, table},
    toy,
};

/// True from the first Ctrl-C on; the second one ends the program at once.
pub fn stop_flag() -> &'static AtomicBool {
    static STOP: AtomicBool = AtomicBool::new(false);
    static HANDLER: OnceLock<bool> = OnceLock::new();
    HANDLER.get_or_init(|| {
        let handler = || {
            if STOP.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            eprintln!("stopping after this update; once more to stop at once");
        };
        ctrlc::set_handler(handler).is_ok()
    });
    &STOP
}

/// Logs to standard error; RUST_LOG says how much.
pub fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

/// What an example adds to the common job.
pub struct Plan {
    /// The folder of the run where none is named.
    pub name: &'static str,
    /// Settings for the toy and for real models; `--config` takes their place.
    pub toy: RunConfig,
    pub real: RunConfig,
}

/// Everything that a run reads.
struct Inputs {
    model_folder: PathBuf,
    config: RunConfig,
    format: ChatFormat,
    data: TrainingData,
    held_out: HeldOut,
}

/// Runs an example, and ends the program with exit code 1 and a message if it fails.
pub fn main(arguments: Arguments, plan: Plan) {
    start_logging();
    if let Err(error) = run(arguments, plan) {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

fn run(arguments: Arguments, plan: Plan) -> Result<()> {
    let device = device(&arguments.device)?;
    let out = arguments.out.clone().unwrap_or_else(|| Path::new("runs").join(plan.name));
    let mut inputs = read_inputs(&arguments, &plan, device, &out)?;
    let kind = inputs.config.model.dtype.on(device);
    let mut model = Decoder::load(&inputs.model_folder, kind, device)?;
    inputs.config.write(out.join("run.toml"))?;
    let measuring = measuring(&arguments, &inputs.config);
    let before = before(&out, || Ok(measuring.measure(&model, &inputs.format, &inputs.held_out)?))?;
    model.add_lora(&inputs.config.lora, inputs.config.train.seed)?;
    let data = std::mem::take(&mut inputs.data);
    let Some(model) = train(&inputs.config, data, model, &out)? else {
        println!("stopped; the same command goes on from the last checkpoint in {}", out.display());
        return Ok(());
    };
    let after = measuring.measure(&model, &inputs.format, &inputs.held_out)?;
    println!("{}", table(&before, &after));
    write_results(&arguments, &inputs, &model, &out, &before, &after)
}

fn read_inputs(arguments: &Arguments, plan: &Plan, device: Device, out: &Path) -> Result<Inputs> {
    let (model_folder, files, default) = match (&arguments.model, arguments.given.clone().files()) {
        (Some(model), Some(files)) => (model.clone(), files, plan.real.clone()),
        _ => {
            let size = if arguments.quick { toy::Size::QUICK } else { toy::Size::FULL };
            let (model, files) = toy::prepare(&out.join("toy"), size, 0)?;
            (model, files, plan.toy.clone())
        }
    };
    let mut config = match &arguments.config {
        Some(path) => RunConfig::read(path)?,
        None => default,
    };
    if arguments.quick {
        config.train.max_updates = Some(3);
        config.train.batch_size = config.train.batch_size.min(8);
    }
    config.train.max_updates = arguments.updates.or(config.train.max_updates);
    config.model.dtype = Dtype::of(config.model.dtype.on(device));
    config.validate()?;
    let format = match config.model.template {
        None => ChatFormat::load(&model_folder)?,
        Some(preset) => ChatFormat::new(Tokenizer::load(&model_folder)?, ChatTemplate::preset(preset)?)?,
    };
    let (data, held_out) = read_data(arguments, &files, &config, &format)?;
    Ok(Inputs { model_folder, config, format, data, held_out })
}

fn read_data(
    arguments: &Arguments,
    files: &Files,
    config: &RunConfig,
    format: &ChatFormat,
) -> Result<(TrainingData, HeldOut)> {
    let pairs = load_pairs(&files.behaviors, &files.targets, files.refusals.clone())?;
    let (pairs, held_out_pairs) = match (&files.validation_behaviors, &files.validation_targets) {
        (Some(behaviors), Some(targets)) => (pairs, load_pairs(behaviors, targets, None)?),
        _ => hold_out(pairs, |pair| pair.group.as_str(), config.train.seed),
    };
    let chats = match &files.utility {
        Some(path) => ChatReader::open(path)?.collect::<advtrain::Result<Vec<Chat>>>()?,
        None => Vec::new(),
    };
    let (chats, held_out_chats) = match &files.harmless {
        Some(path) => (chats, ChatReader::open(path)?.collect::<advtrain::Result<_>>()?),
        None => hold_out(chats, |chat| chat.id.as_str(), config.train.seed),
    };
    let limit = config.data.max_tokens;
    let (robust, report) = encode_pairs(format, &pairs, limit)?;
    say("behaviours", &report);
    let utility = encode_all(format, chats, limit, config, "utility chats")?;
    // One target per behaviour, and none that is judged by a hash: what is left of a set, evenly.
    let held_out_pairs: Vec<AnswerPair> = first_of_each(held_out_pairs).into_iter().take(arguments.measured).collect();
    let (rows, report) = encode_pairs(format, &held_out_pairs, 4096)?;
    say("held-out behaviours", &report);
    let held_out_chats: Vec<Chat> = held_out_chats.into_iter().take(arguments.measured).collect();
    let chat_rows = encode_all(format, held_out_chats.clone(), 1024, config, "held-out chats")?;
    Ok((TrainingData { robust, utility }, HeldOut { pairs: held_out_pairs, rows, chats: held_out_chats, chat_rows }))
}

fn encode_all(
    format: &ChatFormat,
    chats: Vec<Chat>,
    limit: usize,
    config: &RunConfig,
    what: &str,
) -> Result<Vec<Example>> {
    if chats.is_empty() {
        return Ok(Vec::new());
    }
    let (rows, report) = encode_chats(format, chats.into_iter().map(Ok), limit, config.data.turns)?;
    say(what, &report);
    Ok(rows)
}

fn load_pairs(behaviors: &Path, targets: &Path, safe_responses: Option<PathBuf>) -> Result<Vec<AnswerPair>> {
    let files = BehaviorFiles { behaviors: behaviors.into(), targets: targets.into(), safe_responses };
    let (pairs, report) = load_behavior_pairs(&files)?;
    say(&behaviors.display().to_string(), &report);
    Ok(pairs)
}

fn say(what: &str, report: &LoadReport) {
    eprintln!("{what}: {report}");
}

/// A tenth of the rows, chosen by a name that rows which belong together share.
fn hold_out<T>(rows: Vec<T>, name: impl Fn(&T) -> &str, seed: u64) -> (Vec<T>, Vec<T>) {
    let names: Vec<String> = rows.iter().map(|row| name(row).to_string()).collect();
    match split_by_name(&names, 0.1, seed) {
        Ok((_, held_out)) => {
            let mut parts = (Vec::new(), Vec::new());
            for (index, row) in rows.into_iter().enumerate() {
                if held_out.contains(&index) { parts.1.push(row) } else { parts.0.push(row) }
            }
            parts
        }
        Err(_) => (rows, Vec::new()),
    }
}

fn first_of_each(pairs: Vec<AnswerPair>) -> Vec<AnswerPair> {
    let mut seen = std::collections::HashSet::new();
    pairs.into_iter().filter(|pair| !pair.hash_check && seen.insert(pair.group.clone())).collect()
}

fn measuring(arguments: &Arguments, config: &RunConfig) -> Measuring {
    let threat = config.attack.as_ref().map(|attack| attack.threat.clone()).unwrap_or_default();
    Measuring {
        threat: advtrain::ThreatModel { bounded: true, ..threat },
        steps: if arguments.quick { 3 } else { 20 },
        new_tokens: if arguments.quick { 4 } else { 32 },
        rows: 10,
        seed: config.train.seed,
    }
}

/// The figures before training: kept beside the run, so that a resumed one need not measure again.
fn before(out: &Path, measure: impl FnOnce() -> Result<Measured>) -> Result<Measured> {
    let path = out.join("before.json");
    if path.exists() {
        return serde_json::from_str(&fs::read_to_string(&path)?).with_context(|| path.display().to_string());
    }
    eprintln!("measuring the model as it is");
    let before = measure()?;
    fs::write(&path, serde_json::to_string_pretty(&before)?)?;
    Ok(before)
}

/// The hardened model; none if the run was stopped.
fn train(config: &RunConfig, data: TrainingData, model: Decoder, out: &Path) -> Result<Option<Decoder>> {
    let mut builder = AdversarialTrainer::builder(model)
        .robust(config.loss.build())
        .utility(config.utility.clone())
        .data(data)
        .settings(config.train.clone())
        .folder(out);
    if let Some(attack) = &config.attack {
        builder = builder.attack(attack.clone(), config.attack_settings.clone());
    }
    let mut trainer = builder.build()?;
    let done = trainer.resume()?;
    if done > 0 {
        eprintln!("going on after update {done} of {}", trainer.updates_total());
    }
    trainer.observe(JsonLines::open(out.join("metrics.jsonl"), done)?);
    trainer.observe(TensorBoard::create(out.join("tensorboard"), done)?);
    trainer.observe(Progress::new());
    match trainer.run(stop_flag())? {
        Finish::Completed => Ok(Some(trainer.into_model())),
        Finish::Stopped => Ok(None),
    }
}

fn write_results(
    arguments: &Arguments,
    inputs: &Inputs,
    model: &Decoder,
    out: &Path,
    before: &Measured,
    after: &Measured,
) -> Result<()> {
    fs::write(out.join("after.json"), serde_json::to_string_pretty(after)?)?;
    let adapter = out.join("adapter");
    model.save_lora(&adapter, &inputs.model_folder.to_string_lossy())?;
    let metrics = JsonLines::read(out.join("metrics.jsonl"))?;
    ModelCard {
        base_model: &inputs.model_folder.to_string_lossy(),
        config: &inputs.config,
        updates: &metrics,
        results: &table(before, after),
    }
    .write(&adapter)?;
    println!("adapter: {}", adapter.display());
    if arguments.merged {
        let merged = out.join("merged");
        model.save(&merged)?;
        inputs.format.tokenizer().save(&merged)?;
        inputs.format.template().save(&merged)?;
        println!("merged model: {}", merged.display());
    }
    println!(
        "metrics: {} ({} updates, device {:?})",
        out.join("metrics.jsonl").display(),
        metrics.len(),
        model.device()
    );
    Ok(())
}
