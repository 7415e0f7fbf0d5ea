//! The job: load, measure, train, measure, write everything down.

use std::{
    fs,
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use advtrain::{
    AdversarialTrainer, Algorithm, CausalLm, ChatFormat, ChatTemplate, Decoder, Dtype, Example, Family, Finish,
    JsonLines, ModelCard, ModelPreset, Preset, Progress, Radius, Request, RunConfig, TensorBoard, ThreatModel,
    Tokenizer, TrainableLm, TrainingData, UpdateMetrics, device,
    tch::{Device, Kind},
};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;

use super::{
    arguments::Arguments,
    curve::Curve,
    evaluation::{Measured, Measuring, table},
    inputs::{self, Files, HeldOut, folder_name},
    toy,
};

/// What an example adds to the common job.
pub struct Plan {
    /// The example's name, after which folders of runs are called.
    pub name: &'static str,
    pub algorithm: Algorithm,
    /// Settings for the toy.
    pub toy: fn(Preset) -> RunConfig,
}

/// True from the first Ctrl-C on.
pub static STOP: AtomicBool = AtomicBool::new(false);
const STOPPED: i32 = 130;

/// Runs a training example.
pub fn main(arguments: Arguments, plan: Plan) {
    ended(|| run(arguments, plan));
}

/// Does a job. Ends the program with exit code 1 and a message if it fails, with 130 if it was stopped.
pub fn ended(work: impl FnOnce() -> Result<Finish>) {
    start_logging();
    match stop_on_ctrl_c().and_then(|()| work()) {
        Ok(Finish::Completed) => {}
        Ok(Finish::Stopped) => std::process::exit(STOPPED),
        Err(error) => {
            // An error of the crate says everything itself; its source adds libtorch's C++ trace.
            let inner = error.chain().position(|cause| cause.is::<advtrain::Error>());
            let said: Vec<String> =
                error.chain().take(inner.map_or(usize::MAX, |at| at + 1)).map(ToString::to_string).collect();
            eprintln!("error: {}", said.join(": "));
            std::process::exit(1);
        }
    }
}

/// Logs to standard error; RUST_LOG says how much. Where there is no terminal to show a progress bar, every update is logged.
fn start_logging() {
    let default = if std::io::stderr().is_terminal() { "warn" } else { "warn,advtrain=info" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_ansi(colours);
    log.with_writer(std::io::stderr).init();
}

fn stop_on_ctrl_c() -> Result<()> {
    let handler = || {
        if STOP.swap(true, Ordering::Relaxed) {
            // SAFETY: it ends the process and runs nothing of it. `std::process::exit` would take libtorch down while the other
            // threads are at work in it, and they crash.
            unsafe { libc::_exit(STOPPED) }
        }
        eprintln!("stopping as soon as what was begun is saved; once more to stop at once");
    };
    ctrlc::set_handler(handler).context("catching Ctrl-C")
}

/// Everything that a run reads but the weights.
struct Inputs {
    model_folder: PathBuf,
    config: RunConfig,
    format: Arc<ChatFormat>,
    held_out: Arc<HeldOut>,
}

/// Measures, trains, and measures again.
pub fn run(arguments: Arguments, plan: Plan) -> Result<Finish> {
    let mut config = arguments.config(plan.algorithm, plan.toy)?;
    if arguments.print_config {
        if arguments.model.is_none() && arguments.config.is_none() {
            eprintln!("these are the toy's settings; with --model they are those for that model");
        }
        print!("{}", config.to_toml()?);
        return Ok(Finish::Completed);
    }
    if config.attack.is_none() {
        eprintln!("the configuration has no [attack]: this is a control run, which no perturbation is made in");
    }
    if config.train.utility_share > 0.0 && arguments.model.is_some() && arguments.files.utility.is_none() {
        anyhow::bail!("train.utility_share = {}: needs chats to stay useful on: --utility", config.train.utility_share);
    }
    let device = device(&arguments.device)?;
    let kind = config.model.dtype.on(device);
    config.model.dtype = Dtype::of(kind);
    let out = out_folder(&arguments, &plan);
    let Some((model_folder, files)) = model_and_files(&arguments, &out)? else { return Ok(stopped(&out)) };
    let format = Arc::new(chat_format(&mut config, &model_folder, &out)?);
    let rows = inputs::read(&files, &config, &format, arguments.measured)?;
    let mut inputs = Inputs { model_folder, config, format, held_out: Arc::new(rows.held_out) };

    let load = || load_model(&inputs.model_folder, arguments.adapter.as_deref(), kind, device);
    let model = load()?;
    if let Some(lora) = model.lora() {
        inputs.config.lora = lora.clone();
    }
    let measuring = measuring(&arguments, &inputs.config, model.config().family);
    let known = Known { path: out.join("before.json"), of: fingerprint(&model, &inputs, &measuring)? };
    let mut trainer = trainer(&inputs.config, rows.training, model, &out)?;
    let done = trainer.resume()?;
    inputs.config.write(out.join("run.toml"))?;
    let read =
        json!({"model": inputs.model_folder, "adapter": arguments.adapter, "files": files, "reports": rows.reports});
    write_json(&out.join("inputs.json"), &read)?;
    if done > 0 {
        eprintln!("going on after update {done} of {}", trainer.updates_total());
    }

    let before = match known.read()? {
        Some(before) => before,
        None => {
            eprintln!("measuring the model as it is; epsilon of the attack: {}", epsilon(&measuring.threat));
            // Until the first update the trainer's model is the one to measure: a fresh adapter changes nothing.
            let original = if done > 0 { Some(load()?) } else { None };
            let model = original.as_ref().unwrap_or_else(|| trainer.model());
            match measuring.measure(model, &inputs.format, &inputs.held_out, &STOP)? {
                Some(before) => known.write(before)?,
                None => return Ok(stopped(&out)),
            }
        }
    };
    trainer.observe(JsonLines::open(out.join("metrics.jsonl"), |made: &UpdateMetrics| made.update <= done)?);
    trainer.observe(TensorBoard::create(out.join("tensorboard"), done)?);
    trainer.observe(Progress::new());
    if let Some(every) = arguments.curve {
        let short = Measuring { short: true, ..measuring.clone() };
        let (format, held_out) = (inputs.format.clone(), inputs.held_out.clone());
        let mut curve = Curve::open(&out.join("curve.jsonl"), every, done, known.of, short, format, held_out)?;
        curve.catch_up(done, trainer.updates_total(), trainer.model())?;
        trainer.observe(curve);
    }
    if trainer.run(&STOP)? == Finish::Stopped {
        return Ok(stopped(&out));
    }
    // The run has given the folder free; this keeps others out of it until the results are there.
    trainer.resume()?;
    let model = trainer.model();
    eprintln!("measuring the trained model; epsilon of the attack: {}", epsilon(&measuring.threat));
    let Some(after) = measuring.measure(model, &inputs.format, &inputs.held_out, &STOP)? else {
        return Ok(stopped(&out));
    };
    println!("{}", table(&before, &after));
    write_results(&arguments, &inputs, model, &out, &before, &after)?;
    Ok(Finish::Completed)
}

fn stopped(out: &Path) -> Finish {
    println!("stopped; the same command goes on from what is in {}", out.display());
    Finish::Stopped
}

/// Toys, quick ones and each real model have folders of their own.
pub fn out_folder(arguments: &Arguments, plan: &Plan) -> PathBuf {
    let of_model = arguments.model.as_deref().map_or(String::new(), |model| format!("-{}", folder_name(model)));
    let quick = if arguments.quick { "-quick" } else { "" };
    let default = || Path::new("runs").join(format!("{}{of_model}{quick}", plan.name));
    arguments.out.clone().unwrap_or_else(default)
}

/// The model's folder and the data; without a model, those of the toy. None if Ctrl-C stopped the toy's making.
fn model_and_files(arguments: &Arguments, out: &Path) -> Result<Option<(PathBuf, Files)>> {
    match (&arguments.model, arguments.files.clone().files()) {
        (Some(model), Some(files)) => Ok(Some((model.clone(), files))),
        (Some(_), None) => anyhow::bail!("--model needs --behaviors with --targets, or --preferences"),
        (None, _) => {
            let (name, size) = if arguments.quick { ("toy-quick", toy::Size::QUICK) } else { ("toy", toy::Size::FULL) };
            toy::prepare(&out.join(name), size, 0, &STOP)
        }
    }
}

/// The chat format. A date that its template prints is that of the configuration, or of the run that is gone on with, and
/// is written into the configuration.
fn chat_format(config: &mut RunConfig, model_folder: &Path, out: &Path) -> Result<ChatFormat> {
    let format = match config.model.template {
        None => ChatFormat::load(model_folder)?,
        Some(preset) => ChatFormat::new(Tokenizer::load(model_folder)?, ChatTemplate::preset(preset)?)?,
    };
    if !format.template().uses_clock() {
        return Ok(format);
    }
    let path = out.join("run.toml");
    let earlier = if path.exists() { RunConfig::read(path)?.data.date } else { None };
    let date = config.data.date.or(earlier).unwrap_or(format.template().date());
    config.data.date = Some(date);
    Ok(format.with_date(date))
}

/// A model, with an adapter if one is named.
pub fn load_model(folder: &Path, adapter: Option<&Path>, kind: Kind, device: Device) -> Result<Decoder> {
    let mut model = Decoder::load(folder, kind, device)?;
    if let Some(adapter) = adapter {
        model.load_lora(adapter)?;
    }
    Ok(model)
}

/// The trainer that a configuration describes, its adapter added to a model that has none.
pub fn trainer(
    config: &RunConfig,
    data: TrainingData,
    mut model: Decoder,
    out: &Path,
) -> Result<AdversarialTrainer<Decoder>> {
    if model.lora().is_none() {
        model.add_lora(&config.lora, config.train.seed)?;
    }
    let mut builder = AdversarialTrainer::builder(model)
        .robust(config.loss.build())
        .utility(config.utility.clone())
        .data(data)
        .settings(config.train.clone())
        .folder(out);
    if let Some(attack) = &config.attack {
        builder = builder.attack(attack.clone(), config.attack_settings.clone());
    }
    let trainer = builder.build()?;
    if let Some(wanted) = config.train.max_updates.filter(|wanted| *wanted > trainer.updates_total()) {
        let total = trainer.updates_total();
        eprintln!("{wanted} updates wanted, but {} epochs of the rows have {total}", config.train.epochs);
    }
    Ok(trainer)
}

/// The attack's own threat set; in a control run without attack that of the preset for the model's family, so that it is
/// measured as the runs are that it stands beside.
fn measuring(arguments: &Arguments, config: &RunConfig, family: Family) -> Measuring {
    let of_family = || ThreatModel {
        radius: Radius::Relative(ModelPreset::of_family(family).relative_radius()),
        ..ThreatModel::default()
    };
    let mut threat = config.attack.as_ref().map_or_else(of_family, |attack| attack.threat.clone());
    if let Some(share) = arguments.measured_epsilon.or(arguments.epsilon) {
        threat.radius = Radius::Relative(share);
    }
    Measuring {
        threat: ThreatModel { bounded: true, ..threat },
        steps: if arguments.quick { 3 } else { 20 },
        rows: 64,
        seed: config.train.seed,
        short: false,
    }
}

fn epsilon(threat: &ThreatModel) -> String {
    match threat.radius {
        Radius::Relative(share) => format!("{share} of the mean norm of the embeddings"),
        Radius::Absolute(radius) => radius.to_string(),
    }
}

/// What a measurement depends on; `model` is the one that training begins with.
fn fingerprint(model: &Decoder, inputs: &Inputs, measuring: &Measuring) -> Result<String> {
    let Inputs { format, held_out, .. } = inputs;
    let asked = |request: &Request| Example::new(&request.id, format.prompt(&[request.message()])?, Vec::new());
    let requests = held_out.requests.iter().map(asked).collect::<advtrain::Result<Vec<_>>>()?;
    let rows = [&held_out.rows, &held_out.chat_rows, &requests].map(|rows| Example::digest(rows)).join(", ");
    let (kind, version) = (model.kind(), env!("CARGO_PKG_VERSION"));
    let adapter = match model.lora() {
        Some(_) => format!(" with the adapter {}", model.trained_fingerprint()?),
        None => String::new(),
    };
    Ok(format!("{}{adapter} in {kind:?} {rows} {measuring:?} by {version}", model.fingerprint()?))
}

/// Figures that were measured before, kept with what they are of.
struct Known {
    path: PathBuf,
    of: String,
}

/// What the file holds.
#[derive(Serialize, Deserialize)]
struct Kept {
    of: String,
    measured: Measured,
}

impl Known {
    fn read(&self) -> Result<Option<Measured>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let kept: Kept = read_json(&self.path)?;
        Ok((kept.of == self.of).then_some(kept.measured))
    }

    fn write(&self, measured: Measured) -> Result<Measured> {
        let kept = Kept { of: self.of.clone(), measured };
        write_json(&self.path, &kept)?;
        Ok(kept.measured)
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{}: written by another version? remove it", path.display()))
}

/// Beside its place first, so that no moment has half of it.
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let beside = path.with_extension("partial");
    fs::write(&beside, serde_json::to_string_pretty(value)?).with_context(|| beside.display().to_string())?;
    fs::rename(&beside, path).with_context(|| path.display().to_string())
}

fn write_results(
    arguments: &Arguments,
    inputs: &Inputs,
    model: &Decoder,
    out: &Path,
    before: &Measured,
    after: &Measured,
) -> Result<()> {
    write_json(&out.join("after.json"), after)?;
    let adapter = out.join("adapter");
    model.save_lora(&adapter, &inputs.model_folder.to_string_lossy())?;
    let metrics: Vec<UpdateMetrics> = JsonLines::read(out.join("metrics.jsonl"))?;
    ModelCard {
        base_model: &inputs.model_folder.to_string_lossy(),
        begun_from: arguments.adapter.as_ref().map(|adapter| adapter.to_string_lossy()).as_deref(),
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
