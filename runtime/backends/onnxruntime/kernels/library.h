// Shared libraries that a machine has or has not, and functions in them.
#pragma once

#include <initializer_list>

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

// The first of some libraries: of those that the process has loaded already, else of those that can be loaded.
inline void* open_library(std::initializer_list<const char*> names) {
  for (const char* name : names) {
#ifdef _WIN32
    if (void* loaded = GetModuleHandleA(name)) return loaded;
#else
    if (void* loaded = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return loaded;
#endif
  }
  for (const char* name : names) {
#ifdef _WIN32
    if (void* loaded = LoadLibraryA(name)) return loaded;
#else
    if (void* loaded = dlopen(name, RTLD_NOW)) return loaded;
#endif
  }
  return nullptr;
}

template <typename F>
bool find(void* library, const char* name, F& function) {
#ifdef _WIN32
  function = reinterpret_cast<F>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  function = reinterpret_cast<F>(dlsym(library, name));
#endif
  return function != nullptr;
}
