// Runs a package that `timm-gac export MODEL OUT.pt2 --compiled` wrote, in a process without Python.
//
//   run_package OUT.pt2 IMAGES.bin LOGITS.bin BATCH CHANNELS HEIGHT WIDTH [cuda]
//
// IMAGES.bin holds normalised images, float32 in the order (N, CHANNELS, HEIGHT, WIDTH); they run in batches of BATCH,
// which N has to be a multiple of. LOGITS.bin gets (N, classes), float32. See CMakeLists.txt for how to build it.
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("expected a file to read, got " + path + ": check its name");
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

int run(int argc, char** argv) {
  if (argc < 8) {
    throw std::runtime_error("expected OUT.pt2 IMAGES.bin LOGITS.bin BATCH CHANNELS HEIGHT WIDTH [cuda]");
  }
  const bool cuda = argc > 8 && std::string(argv[8]) == "cuda";
  const int64_t batch = std::atoll(argv[4]);
  std::vector<int64_t> shape{-1, std::atoll(argv[5]), std::atoll(argv[6]), std::atoll(argv[7])};
  std::vector<char> bytes = read_file(argv[2]);
  const auto values = static_cast<int64_t>(bytes.size() / sizeof(float));
  const at::Tensor images = at::from_blob(bytes.data(), {values}, at::kFloat).view(shape);
  if (batch < 1 || images.size(0) % batch != 0) {
    throw std::runtime_error("expected a number of images that is a multiple of BATCH, got another: choose another");
  }

  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  std::ofstream logits(argv[3], std::ios::binary);
  int64_t classes = 0;
  for (const at::Tensor& some : images.split(batch)) {
    const std::vector<at::Tensor> outputs = package.run({cuda ? some.to(at::kCUDA) : some.contiguous()});
    const at::Tensor answer = outputs.at(0).to(at::kCPU, at::kFloat).contiguous();
    classes = answer.size(1);
    logits.write(static_cast<const char*>(answer.const_data_ptr()), static_cast<std::streamsize>(answer.nbytes()));
  }
  std::cout << images.size(0) << " images, " << classes << " classes\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
