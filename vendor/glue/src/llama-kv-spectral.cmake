# Links the spectral-kv library, which does the work of --kv-spectral (llama-kv-spectral.cpp), into libllama.

set(LLAMA_KV_SPECTRAL_LIB     "" CACHE FILEPATH "path of libspectral_kv.a")
set(LLAMA_KV_SPECTRAL_INCLUDE "" CACHE PATH     "directory of spectral_kv_llama.h")

if (NOT EXISTS "${LLAMA_KV_SPECTRAL_LIB}")
    message(FATAL_ERROR "LLAMA_KV_SPECTRAL needs -DLLAMA_KV_SPECTRAL_LIB=/path/to/libspectral_kv.a; '${LLAMA_KV_SPECTRAL_LIB}' does not exist")
endif()
if (NOT EXISTS "${LLAMA_KV_SPECTRAL_INCLUDE}/spectral_kv_llama.h")
    message(FATAL_ERROR "LLAMA_KV_SPECTRAL needs -DLLAMA_KV_SPECTRAL_INCLUDE=/directory/of/spectral_kv_llama.h; '${LLAMA_KV_SPECTRAL_INCLUDE}/spectral_kv_llama.h' does not exist")
endif()

find_package(Threads REQUIRED)

add_library(spectral_kv STATIC IMPORTED)
set_target_properties(spectral_kv PROPERTIES IMPORTED_LOCATION "${LLAMA_KV_SPECTRAL_LIB}")

# what rustc --print native-static-libs lists
target_link_libraries(spectral_kv INTERFACE Threads::Threads ${CMAKE_DL_LIBS})
if (WIN32)
    target_link_libraries(spectral_kv INTERFACE ws2_32 userenv ntdll bcrypt)
elseif (NOT APPLE)
    target_link_libraries(spectral_kv INTERFACE gcc_s util rt m)
endif()

target_link_libraries(llama PRIVATE spectral_kv)

# The symbols of the library, those of Rust's standard library among them, stay inside of libllama.so.
if (NOT WIN32 AND NOT APPLE)
    get_filename_component(LLAMA_KV_SPECTRAL_NAME "${LLAMA_KV_SPECTRAL_LIB}" NAME)
    target_link_options(llama PRIVATE "LINKER:--exclude-libs,${LLAMA_KV_SPECTRAL_NAME}")
endif()

# for this file only, so that switching the option does not rebuild the others
set_source_files_properties(llama-kv-spectral.cpp PROPERTIES
    COMPILE_DEFINITIONS LLAMA_KV_SPECTRAL
    INCLUDE_DIRECTORIES "${LLAMA_KV_SPECTRAL_INCLUDE}")

# The remote control for evaluations. Its target is here, in a file of ours, so that the patch need not touch tools/CMakeLists.txt.
if (LLAMA_BUILD_TOOLS)
    add_executable(llama-kv-spectral-probe ${PROJECT_SOURCE_DIR}/tools/kv-spectral-probe.cpp)
    target_link_libraries(llama-kv-spectral-probe PRIVATE llama vendor::nlohmann)
    # for llama-ext.h and llama-kv-spectral.h
    target_include_directories(llama-kv-spectral-probe PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
    target_compile_features(llama-kv-spectral-probe PRIVATE cxx_std_17)
endif()
