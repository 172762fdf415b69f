// Names of graphs and tensors that hosts know; every other name is the bundle's own.
#pragma once

#include <array>

namespace ddit::names {

constexpr const char* kUpdate = "step";
constexpr const char* kPredict = "predict";
constexpr const char* kGrow = "grow";
constexpr const char* kGuide = "guide";
constexpr const char* kNext = "next_";  // before a buffer's name: its value for the step after
constexpr const char* kDeviation = "deviation_";
constexpr const char* kPredictionError = "prediction_error";
constexpr const char* kVelocities = "velocities";
constexpr const char* kPrediction = "prediction";
constexpr const char* kLatent = "latent";
constexpr const char* kImage = "image";
constexpr const char* kLatentFrame = "latent_frame";
constexpr const char* kFrames = "frames";
constexpr const char* kIds = "input_ids";
constexpr const char* kGuidance = "guidance";
constexpr const char* kTimestep = "timestep";
constexpr const char* kDt = "dt";
constexpr const char* kSolver = "solver";
constexpr const char* kEstimates = "estimates";
constexpr const char* kVelocity = "velocity";
constexpr std::array<const char*, 2> kPasses = {"velocity_conditional", "velocity_unconditional"};
constexpr const char* kCorrection = "correction";
constexpr const char* kKeepEstimate = "keep_estimate";
constexpr const char* kKeepVelocity = "keep_velocity";
constexpr const char* kCarry = "carry";
constexpr const char* kNegative = "negative_";  // before a level's input: what the negative prompt gives
constexpr const char* kGateInput = "gate_input";
constexpr const char* kNoise = "noise";
constexpr const char* kGain = "gain";
constexpr std::array<const char*, 3> kGateChanges = {"gate_change", "gate_change_low", "gate_change_high"};
constexpr std::array<const char*, 2> kTables = {"rope_cos", "rope_sin"};
constexpr std::array<const char*, 5> kGrowingTables = {"dct_small_height", "dct_small_width", "dct_height", "dct_width",
                                                       "fresh"};

}  // namespace ddit::names
